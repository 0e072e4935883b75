"""A network of PyTorch as a graph: its operators recorded on fake tensors, then lowered to ours."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from groupconv.compiler.building import Builder
from groupconv.compiler.graph import Graph
from groupconv.compiler.operators import lower
from groupconv.errors import GroupConvError


def capture(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Graph, pytree.TreeSpec]:
    """What ``model`` computes on inputs of such sizes, and the structure of what it returns.

    Args:
        model: in evaluation mode, on the CPU. It is run once, without arithmetic.
        inputs: its arguments; only their shapes, dtypes and layouts count.

    Raises:
        GroupConvError: the model can't be recorded, as where what it does depends on numbers.
    """
    with torch.no_grad():
        return _capture(model, inputs)


def _capture(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[Graph, pytree.TreeSpec]:
    recorded, structure = _record(model, inputs)
    names = {t.data_ptr(): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    builder = Builder(names)
    held: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    for node in recorded.graph.nodes:
        match node.op:
            case "placeholder":
                held[node] = builder.input(next(arguments))
            case "get_attr":
                held[node] = _attribute(recorded, node.target)
            case "call_function":
                held[node] = lower(
                    builder, node, *fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
                )
            case "output":
                leaves = [
                    held[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in node.args[0]
                ]
    return builder.finish(leaves), structure


def _record(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    """Operators of PyTorch, none of which changes a tensor in place."""
    structures = []

    def run(*tensors: Tensor) -> list[Any]:
        leaves, structure = pytree.tree_flatten(model(*tensors))
        structures.append(structure)
        return leaves

    try:
        functional = torch.func.functionalize(run, remove="mutations")
        # The parameters are real, and stay the very same tensors.
        recorded = make_fx(functional, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:
        raise GroupConvError(
            f"compile: {type(model).__name__} can't be recorded: {type(error).__name__}: {error}"
        ) from error
    return recorded, structures[-1]


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
