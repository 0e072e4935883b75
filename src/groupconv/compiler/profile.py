"""Where a compiled network spends its time and its memory, step by step."""

import bisect
import io
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from groupconv.compiler.program import Program
from groupconv.compiler.task import Call, Task
from groupconv.kernels import openmp
from groupconv.kernels.peak import peak

_RUNS = 30


@dataclass(frozen=True)
class StepTime:
    """One step.

    Args:
        name: of the module or operator that it comes from.
        kind: what it does.
        seconds: median of its times.
        macs, bytes: multiply-adds, and bytes read and written; 0 where PyTorch runs it.
        native: whether it runs on native code.
    """

    name: str
    kind: str
    seconds: float
    macs: int
    bytes: int
    native: bool

    @property
    def flops(self) -> float:
        """Floating-point operations per second, two for each multiply-add."""
        return 2 * self.macs / self.seconds


@dataclass(frozen=True)
class Block:
    """A part of the arena: in use from the step ``first`` to the step ``last``; in bytes."""

    first: int
    last: int
    offset: int
    size: int


@dataclass(frozen=True)
class NetworkProfile:
    """The steps of a compiled network, in order.

    Args:
        steps: with their times; each was timed alone, so their sum is a little more than the
            time of the whole.
        threads: that shared the work.
        peak: floating-point operations per second that these threads can do at best.
        seconds: median time of the whole network.
        arena: its bytes.
        blocks: what lies in it.
    """

    steps: tuple[StepTime, ...]
    threads: int
    peak: float
    seconds: float
    arena: int
    blocks: tuple[Block, ...]

    def table(self) -> Table:
        """The steps as a table for the terminal."""
        table = Table(title=f"{1e3 * self.seconds:.3f} ms, {self.threads} threads")
        for column in ("step", "kind"):
            table.add_column(column)
        for column in ("us", "share", "GFLOP/s", "of peak", "GB/s"):
            table.add_column(column, justify="right")
        total = sum(step.seconds for step in self.steps)
        for step in self.steps:
            speed = (f"{step.flops / 1e9:.1f}", f"{step.flops / self.peak:.0%}")
            table.add_row(
                step.name,
                step.kind if step.native else f"PyTorch: {step.kind}",
                f"{1e6 * step.seconds:.1f}",
                f"{step.seconds / total:.1%}",
                *(speed if step.macs else ("", "")),
                f"{step.bytes / step.seconds / 1e9:.1f}" if step.bytes else "",
            )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=140)
        console.print(self.table())
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def picture(self, path: str | Path) -> None:
        """Draw the time line, and below it the arena over the same steps.

        Args:
            path: of a file such as ``.svg`` or ``.png``.
        """
        # Takes as long to import as all the rest.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 6), layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=(2, 3))
        ends = [0.0]
        for step in self.steps:
            ends.append(ends[-1] + 1e3 * step.seconds)
        kinds = sorted({step.kind.split(",")[0] for step in self.steps})
        for number, kind in enumerate(kinds):
            chosen = [i for i, s in enumerate(self.steps) if s.kind.split(",")[0] == kind]
            above.bar(
                [ends[i] for i in chosen],
                [self.steps[i].flops / 1e9 for i in chosen],
                [ends[i + 1] - ends[i] for i in chosen],
                align="edge", color=f"C{number % 10}", edgecolor="white", linewidth=0.3, label=kind,
            )  # fmt: skip
        above.axhline(self.peak / 1e9, color="#888888", linestyle=":", label="peak")
        above.set_ylabel("GFLOP/s")
        above.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
        for number, block in enumerate(self.blocks):
            start, end = ends[block.first], ends[block.last + 1]
            below.broken_barh(
                [(start, end - start)], (block.offset / 2**20, block.size / 2**20),
                facecolor=f"C{number % 10}", alpha=0.7, edgecolor="white", linewidth=0.3,
            )  # fmt: skip
        below.set_ylabel(f"arena, MiB (in all {self.arena / 2**20:.1f})")
        below.set_xlabel("ms")
        figure.savefig(path)


@dataclass(frozen=True)
class Cut:
    """An operator that PyTorch runs, between native code before it and after it.

    Args:
        name: of the module or operator that it comes from.
        operator: of PyTorch.
        reason: why it is not native.
        seconds: that it takes.
    """

    name: str
    operator: str
    reason: str
    seconds: float


@dataclass(frozen=True)
class Report:
    """What became of a network.

    Args:
        tasks: pieces of native work.
        cuts: what PyTorch runs.
        seconds: of the whole.
        arena, weights: bytes.
    """

    tasks: int
    cuts: tuple[Cut, ...]
    seconds: float
    arena: int
    weights: int

    def __str__(self) -> str:
        lines = [
            f"{self.tasks} native steps, {len(self.cuts)} by PyTorch; "
            f"{1e3 * self.seconds:.3f} ms; "
            f"arena {self.arena / 2**20:.1f} MiB, weights {self.weights / 2**20:.1f} MiB"
        ]
        lines += [
            f"  {cut.name}: {1e3 * cut.seconds:.3f} ms: {cut.operator}: {cut.reason}"
            for cut in self.cuts
        ]
        return "\n".join(lines)


def profile(program: Program, inputs: Sequence[Tensor]) -> NetworkProfile:
    """Time every step of a program many times over."""
    session, clock = program.session(), time.perf_counter
    session(inputs)
    samples, wholes = [], []
    for _ in range(_RUNS):
        samples.append(session.timed(inputs, clock)[1])
        start = clock()
        session(inputs)
        wholes.append(clock() - start)
    seconds = [statistics.median(times) for times in zip(*samples, strict=True)]
    steps = []
    for step, time_ in zip(program.steps, seconds, strict=True):
        if isinstance(step, Task):
            steps.append(StepTime(step.name, step.kind, time_, step.macs, step.bytes, True))
        else:
            steps.append(StepTime(step.name, str(step.host.target), time_, 0, 0, False))
    threads = openmp.threads()
    return NetworkProfile(
        tuple(steps),
        threads,
        peak(threads),
        statistics.median(wholes),
        program.memory.arena,
        _blocks(program),
    )


def _blocks(program: Program) -> tuple[Block, ...]:
    numbers = {node.output: number for number, node in enumerate(program.graph.nodes)}
    # Of the node that each step belongs to: some nodes have no step, some have several.
    of_steps = [numbers[step.output] for step in program.steps]
    return tuple(
        Block(
            min(bisect.bisect_left(of_steps, storage.first), len(of_steps) - 1),
            max(bisect.bisect_right(of_steps, storage.last) - 1, 0),
            storage.offset,
            storage.size,
        )
        for storage in program.memory.storages()
        if storage.kind == "arena"
    )


def report(program: Program, inputs: Sequence[Tensor]) -> Report:
    """What runs on native code, and what PyTorch runs, with its time."""
    found = profile(program, inputs)
    cuts = tuple(
        Cut(step.name, str(step.host.target), step.host.reason, timed.seconds)
        for step, timed in zip(program.steps, found.steps, strict=True)
        if isinstance(step, Call)
    )
    tasks = len(program.steps) - len(cuts)
    return Report(tasks, cuts, found.seconds, found.arena, program.weights)
