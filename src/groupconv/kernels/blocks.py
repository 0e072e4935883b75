"""Blocks: which output channels are computed together, and which input channel each lane sees.

Output channels lie in the lanes of vectors. Where a group is at least a vector wide, all lanes of
a vector see the same input channel, one value for all. Where it is narrower, a vector holds
several groups and each lane sees the channel of its own group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.spec import ConvSpec

# Values that are rather loaded one by one than picked from two vectors.
_FEW = 3


@dataclass(frozen=True)
class Vector:
    """Consecutive output channels in one register.

    Args:
        offset: the first output channel, counted from the block's first.
        sources: for each lane in use the first input channel of its group, counted from the
            block's first input channel.
        scalar: whether the lanes see few values, loaded one by one, rather than parts of a vector.
    """

    offset: int
    sources: tuple[int, ...]
    scalar: bool


@dataclass(frozen=True)
class Block:
    """Blocks of the same form: ``outer`` times ``inner`` of them, at even distances.

    Args:
        vectors: the output channels of one block.
        inputs: consecutive input channels that one block sees.
        width: input channels of a group.
        first_output, first_input: channels where the first block starts.
        outer, outer_output, outer_input: how many, and the distance between them.
        inner, inner_output: the same for blocks that share their input channels.
    """

    vectors: tuple[Vector, ...]
    inputs: int
    width: int
    first_output: int
    first_input: int
    outer: int
    outer_output: int
    outer_input: int
    inner: int = 1
    inner_output: int = 0

    @property
    def count(self) -> int:
        return self.outer * self.inner

    @property
    def outputs(self) -> int:
        """Output channels of one block."""
        last = self.vectors[-1]
        return last.offset + len(last.sources)

    @property
    def scalar(self) -> bool:
        return all(vector.scalar for vector in self.vectors)

    def start(self, e: Emitter, index: Value) -> tuple[Value, Value]:
        """Code for the first output and the first input channel of one block."""
        outer, inner = e.div(index, self.inner), e.rem(index, self.inner)
        output = e.add(e.mul(outer, self.outer_output), e.mul(inner, self.inner_output))
        return (
            e.add(self.first_output, output),
            e.add(self.first_input, e.mul(outer, self.outer_input)),
        )

    def starts(self) -> Iterator[tuple[int, int]]:
        """First output and first input channel of every block, in the order of its index."""
        for outer in range(self.outer):
            for inner in range(self.inner):
                yield (
                    self.first_output + outer * self.outer_output + inner * self.inner_output,
                    self.first_input + outer * self.outer_input,
                )


def blocks(spec: ConvSpec, lanes: int, vectors: int) -> list[Block]:
    """Cut the output channels of ``spec`` into blocks of about ``vectors`` vectors."""
    wide_in, wide_out = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    run, aligned = _groups_in_a_run(wide_in, wide_out, lanes, spec.kernel_size[1])
    if run == 1 and wide_out > lanes:
        return _parts_of_a_group(spec, wide_in, wide_out, lanes, vectors)
    per_run = -(-run * wide_out // lanes)
    run = min(spec.groups, run * max(1, vectors // per_run))
    found, done = [], 0
    while done < spec.groups:
        run = min(run, spec.groups - done)
        count = (spec.groups - done) // run
        found.append(
            Block(
                _vectors(run, wide_in, wide_out, lanes, aligned),
                run * wide_in,
                wide_in,
                done * wide_out,
                done * wide_in,
                count,
                run * wide_out,
                run * wide_in,
            )
        )
        done += count * run
    return found


def _groups_in_a_run(wide_in: int, wide_out: int, lanes: int, columns: int) -> tuple[int, int]:
    """Groups that are computed together at least, and outputs in a vector.

    Vectors end with a group, and lanes may stay empty; or they are filled, and some hold parts of
    two groups, which need more loads. ``columns`` multiply-adds share them.
    """
    whole = max(1, lanes // wide_out)

    def cost(run: int, aligned: int) -> float:
        """Of one group: multiply-adds, and half as much for loads and shuffles."""
        vectors = _vectors(run, wide_in, wide_out, lanes, aligned)
        values = {source for vector in vectors if vector.scalar for source in vector.sources}
        extra = len(values)
        for vector in vectors:
            groups = len(set(vector.sources))
            extra += groups - 1 if vector.scalar else 2 * -(-groups * wide_in // lanes)
        return round((len(vectors) * columns + extra / 2) / run, 2)

    plain = (whole, min(lanes, whole * wide_out))
    # At most four vectors: each holds a tile of sums.
    filled = [(run, lanes) for run in range(whole + 1, 4 * lanes // wide_out + 1)]
    return min([plain, *filled], key=lambda way: (cost(*way), way[0]))


def _parts_of_a_group(
    spec: ConvSpec, wide_in: int, wide_out: int, lanes: int, vectors: int
) -> list[Block]:
    """Blocks of a group wider than a vector: full ones, then one with what is left."""
    size = min(vectors, -(-wide_out // lanes)) * lanes
    full, left = divmod(wide_out, size)
    found = []
    for first, count, outputs in ((0, full, size), (full * size, 1, left)):
        if count and outputs:
            cut = tuple(
                Vector(at, (0,) * min(lanes, outputs - at), True) for at in range(0, outputs, lanes)
            )
            found.append(
                Block(cut, wide_in, wide_in, first, 0, spec.groups, wide_out, wide_in, count, size)
            )
    return found


def _vectors(run: int, wide_in: int, wide_out: int, lanes: int, aligned: int) -> tuple[Vector, ...]:
    """The vectors of ``run`` whole groups, ``aligned`` outputs in each."""
    outputs, found = run * wide_out, []
    for at in range(0, outputs, aligned):
        groups = [o // wide_out for o in range(at, min(outputs, at + aligned))]
        count = groups[-1] - groups[0] + 1
        scalar = count == 1 or (count <= _FEW and count * wide_in > lanes)
        found.append(Vector(at, tuple(g * wide_in for g in groups), scalar))
    return tuple(found)
