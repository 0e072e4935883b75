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

# What they change is noise that nothing reads.
_HARMLESS = {torch.ops.aten.rrelu_with_noise}


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
    # Copies: the graph does not change with the network, nor the network while it is recorded.
    parts = (*model.named_parameters(), *model.named_buffers())
    own = {name: tensor.detach().clone() for name, tensor in parts}
    recorded, structure = _record(model, own, inputs)
    _refuse_changes(recorded)
    recorded.graph.eliminate_dead_code()
    builder = Builder({x.data_ptr(): name for name, x in own.items()})
    held: dict[fx.Node, Any] = {}
    arguments = iter(inputs)
    for node in recorded.graph.nodes:
        match node.op:
            case "placeholder":
                held[node] = builder.input(next(arguments))
            case "get_attr":
                found = held[node] = _attribute(recorded, node.target)
                if isinstance(found, Tensor) and found.data_ptr() not in builder.names:
                    # The network holds it beside its parameters and buffers.
                    held[node] = found.clone()
            case "call_function":
                held[node] = lower(
                    builder, node, *fx.node.map_arg((node.args, node.kwargs), held.__getitem__)
                )
            case "output":
                leaves = [
                    held[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in node.args[0]
                ]
    return builder.finish(leaves), structure


def _record(
    model: nn.Module, own: dict[str, Tensor], inputs: Sequence[Tensor]
) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    """Operators of PyTorch, none of which changes a tensor that another one made.

    Args:
        own: what stands in for the parameters and buffers.
    """
    structures = []

    def run(*tensors: Tensor) -> list[Any]:
        result = torch.func.functional_call(model, own, tensors)
        leaves, structure = pytree.tree_flatten(result)
        structures.append(structure)
        return leaves

    try:
        functional = torch.func.functionalize(run, remove="mutations")
        # The tensors in ``own`` are real, and stay the very same ones.
        recorded = make_fx(functional, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:
        raise GroupConvError(
            f"compile: {type(model).__name__} can't be recorded: {type(error).__name__}: {error}"
        ) from error
    return recorded, structures[-1]


def _refuse_changes(recorded: fx.GraphModule) -> None:
    """Raise where the network changes its own tensors, as batch norms in training do."""
    for node in recorded.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.inplace_view in node.target.tags or node.target.overloadpacket in _HARMLESS:
            continue
        schema = node.target._schema.arguments
        changed = [
            value
            for argument, value in zip(schema, node.args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if node.target.overloadpacket is torch.ops.aten.native_batch_norm and node.args[5]:
            # Its schema doesn't tell.
            changed += node.args[3:5]
        for value in changed:
            if isinstance(value, fx.Node):
                kinds = {"placeholder": "an input", "get_attr": "its own tensors"}
                whose = kinds.get(_owner(value).op, "a tensor that it made")
                raise GroupConvError(
                    f"compile: the network changes {whose} while it runs: {node.target}"
                )


def _owner(node: fx.Node) -> fx.Node:
    """What a tensor is a view of, or itself."""
    while isinstance(node.target, torch._ops.OpOverload):
        returned = node.target._schema.returns[0].alias_info
        if returned is None:
            break
        node = node.all_input_nodes[0]
    return node


def _attribute(module: nn.Module, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
