"""Which channels may change places: colour refinement on the graph of all channels.

Every channel of every tensor, and every index of a parameter's axis, is a *cell*. An operator that
makes one channel from another ties the two cells by an edge, labelled by what it does: which
operator, which operand, which place in a flattened map. A permutation of the cells that keeps all
edges and labels is a reordering of the network that changes no output. Connected cells are a
strand; strands of equal signature, the multiset of their labelled edges, are interchangeable.

Cells of one tensor in one strand are told apart by refining colours (Weisfeiler and Leman 1968). A
strand in which some can't be told apart (``x + shuffle(x)``) stays where it is.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from groupconv.optimize.spaces import Axis, Space

Cells = NDArray[np.int64]
Hashes = NDArray[np.uint64]

ALIKE = "its channels meet each other in ways that can't be told apart"


def mix(*parts: int | NDArray[np.generic]) -> Hashes:
    """A 64-bit hash of numbers, element by element (the finalizer of splitmix64)."""
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = state + np.asarray(part).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def sums(index: Cells, hashes: Hashes, count: int) -> Hashes:
    """The sum, modulo 2**64, of the hashes with each index: a hash of their multiset."""
    total = np.zeros(count, dtype=np.uint64)
    np.add.at(total, index, hashes)
    return total


def ranks(keys: NDArray[np.generic]) -> Cells:
    """How many equal keys stand before each."""
    order = np.argsort(keys, kind="stable")
    runs = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], runs[1:] != runs[:-1]]))
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = np.arange(len(keys)) - np.repeat(starts, np.diff([*starts, len(keys)]))
    return ranks


class Ties:
    """Cells and edges, collected while a graph is read."""

    def __init__(self) -> None:
        self._count = 0
        self._tensors: list[Hashes] = []
        self._edges: list[tuple[Cells, Cells, Hashes]] = []
        self._fixed: list[tuple[Cells, str]] = []

    def open(self, count: int) -> Cells:
        """The cells of a new tensor."""
        cells = np.arange(self._count, self._count + count)
        self._count += count
        self._tensors.append(np.full(count, len(self._tensors), dtype=np.uint64))
        return cells

    def tie(self, cells: Cells, sources: Cells, labels: Hashes) -> None:
        """An edge from each source to the cell at its position; labels may be one for all."""
        self._edges.append((cells, sources, np.broadcast_to(labels, cells.shape)))

    def fix(self, cells: Cells, reason: str) -> None:
        """Forbid to move the strands of these cells; the first reason is kept."""
        self._fixed.append((cells, reason))

    def solve(self, axes: Sequence[Cells]) -> tuple[tuple[Space, ...], list[Axis]]:
        """The spaces, and what stands on each of the given axes."""
        a, b, labels = (np.concatenate(part) for part in zip(*self._edges, strict=True))
        # Here, because scipy's own BLAS starts its threads when it is imported.
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        graph = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(self._count,) * 2)
        strand = _by_first(connected_components(graph, directed=False)[1])
        fixed = np.full(strand.max() + 1, -1)
        reasons = [reason for _, reason in self._fixed]
        for cells, reason in reversed(self._fixed):
            fixed[strand[cells]] = reasons.index(reason)
        tensors = np.concatenate(self._tensors)
        kind = _by_first(_signatures(strand, tensors, a, b, labels))
        # Only strands that have a partner could move at all.
        movable = (fixed < 0) & (np.bincount(kind)[kind] > 1)
        colours, blurred = _refine(strand, tensors, a, b, labels, movable)
        fixed[blurred] = len(reasons)
        reasons.append(ALIKE)
        kind = _by_first(_signatures(strand, colours, a, b, labels))
        space = _by_first(kind * len(reasons) + fixed)
        of_first = np.unique(space, return_index=True)[1]
        counts = np.bincount(space)
        spaces = tuple(
            Space(int(count), None if fixed[s] < 0 else reasons[fixed[s]])
            for count, s in zip(counts, of_first, strict=True)
        )
        place = ranks(space)
        found = []
        for cells in axes:
            on = strand[cells]
            order = np.lexsort((_by_first(colours[cells]), on))
            slots = np.empty(len(cells), dtype=np.int64)
            slots[order] = ranks(on[order])
            found.append(Axis(*(tuple(n.tolist()) for n in (space[on], place[on], slots))))
        return spaces, found


def _signatures(strand: Cells, colours: Hashes, a: Cells, b: Cells, labels: Hashes) -> Hashes:
    """Equal for strands with the same colours and edges."""
    count = int(strand.max()) + 1
    cells = sums(strand, mix(colours), count)
    return cells + sums(strand[a], mix(labels, colours[a], colours[b]), count)


def _refine(
    strand: Cells, colours: Hashes, a: Cells, b: Cells, labels: Hashes, movable: NDArray[np.bool_]
) -> tuple[Hashes, NDArray[np.bool_]]:
    """Colours that differ within every movable strand, and the strands where none were found."""
    distinct = 0
    while True:
        order = np.lexsort((colours, strand))
        same = (np.diff(strand[order]) == 0) & (np.diff(colours[order]) == 0)
        blurred = np.zeros(len(movable), dtype=bool)
        blurred[strand[order][1:][same]] = True
        blurred &= movable
        if not blurred.any() or len(same) - same.sum() <= distinct:
            return colours, blurred
        distinct = len(same) - int(same.sum())
        inside, cells = blurred[strand[a]], blurred[strand]
        a_, b_, l_ = a[inside], b[inside], labels[inside]
        count = len(colours)
        seen = sums(a_, mix(l_, colours[b_], 0), count) + sums(b_, mix(l_, colours[a_], 1), count)
        colours = np.where(cells, mix(colours, seen), colours)


def _by_first(keys: NDArray[np.generic]) -> Cells:
    """Equal keys as equal numbers, counted in the order of their first places."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[inverse]
