"""Graphs made shorter: each pass is a function from a graph to one that computes the same.

A pass returns the graph itself where it finds nothing to do. What is left to do is less after
every other step: fewer nodes or terms, or fewer numbers that are moved.
"""

from collections.abc import Callable

from groupconv.compiler.constants import evaluate_constants
from groupconv.compiler.dissolve import dissolve
from groupconv.compiler.fold import fold
from groupconv.compiler.fuse import fuse
from groupconv.compiler.gather import gather_once
from groupconv.compiler.graph import Graph
from groupconv.compiler.layout import settle_layouts
from groupconv.compiler.maps import merge
from groupconv.compiler.padding import absorb_padding
from groupconv.compiler.tidy import tidy

PASSES: tuple[Callable[[Graph], Graph], ...] = (
    tidy,
    evaluate_constants,
    settle_layouts,
    absorb_padding,
    merge,
    fuse,
    fold,
    gather_once,
    dissolve,
)
# Rounds after which it is our mistake that there still is something to do.
_ROUNDS = 1000


def optimize(graph: Graph) -> Graph:
    """The same function with as little work as we know; its inputs and outputs stay as they are."""
    for _ in range(_ROUNDS):
        before = graph
        for change in PASSES:
            graph = change(graph)
        if graph is before:
            return graph
    raise AssertionError("the passes undo each other's work")
