"""Modules of PyTorch held against what is made of them: the captured graph, and native code."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from compare import assert_close
from compiler.evaluate import evaluate
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import groupconv
from groupconv.compiler.capture import capture
from groupconv.compiler.compiled import Compiled
from groupconv.compiler.graph import Graph, Host, Value
from groupconv.compiler.task import empty


class Function(nn.Module):
    """A function of tensors, with the modules that it uses, as a network in evaluation mode."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.function = function
        self.eval()

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*self.parts, *inputs)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def agree(module: nn.Module, *inputs: Tensor, tolerance: float = 1e-5) -> Compiled:
    """The compiled network, after its graph and its native code were found to equal eager PyTorch.

    Args:
        tolerance: of the difference, relative to the largest number of each output.
    """
    graph, structure = captured(module, *inputs)
    expected, wanted = _eager(module, inputs)
    assert structure == wanted
    _compare(evaluate(graph, [x.clone() for x in inputs]), expected, tolerance)
    compiled = groupconv.compile(module, inputs)
    runs(compiled, module, *inputs, tolerance=tolerance)
    return compiled


def runs(compiled: Compiled, module: nn.Module, *inputs: Tensor, tolerance: float = 1e-5) -> None:
    """Two calls of the network equal eager PyTorch, the second one in poisoned memory."""
    expected, wanted = _eager(module, inputs)
    for _ in range(2):
        with poisoned(compiled):
            found = compiled(*(x.clone(memory_format=torch.preserve_format) for x in inputs))
        leaves, structure = pytree.tree_flatten(found)
        assert structure == wanted
        assert [leaf.dtype for leaf in leaves] == [leaf.dtype for leaf in expected]
        _compare(leaves, expected, tolerance)


def captured(module: nn.Module, *inputs: Tensor) -> tuple[Graph, pytree.TreeSpec]:
    return capture(module, inputs)


def cuts(compiled: Compiled) -> dict[str, str]:
    """What PyTorch runs, and why: operators to reasons, of all programs."""
    return {
        str(node.operator.target): node.operator.reason
        for program, _ in compiled.programs.values()
        for node in program.graph.nodes
        if isinstance(node.operator, Host)
    }


@contextmanager
def poisoned(compiled: Compiled) -> Iterator[None]:
    """Arenas that wait for a call, and outputs that it makes, are full of NaN before."""
    for program, _ in compiled.programs.values():
        for session in program._free:
            session.arena.fill_(math.nan)
            session.scratch.fill_(math.nan)

    def filled(value: Value) -> Tensor:
        made = empty(value)
        return made.fill_(math.nan) if made.is_floating_point() else made

    with mock.patch("groupconv.compiler.session.empty", filled):
        yield


@torch.no_grad()
def _eager(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], pytree.TreeSpec]:
    copies = (x.clone(memory_format=torch.preserve_format) for x in inputs)
    return pytree.tree_flatten(module(*copies))


def _compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected)
    for y, z in zip(found, expected, strict=True):
        finite = z[z.isfinite()] if z.is_floating_point() else z
        scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
        assert_close(y, z, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
