"""Where a compiled network spends its time and its memory, step by step."""

import bisect
import io
import itertools
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
        title = f"{1e3 * self.seconds:.3f} ms on {self.threads} threads"
        table = Table(title=title, title_justify="left")
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
        from matplotlib.patches import Patch

        figure = Figure(figsize=(11, 6.5), layout="constrained")
        line, speed, arena = figure.subplots(3, sharex=True, height_ratios=(1, 6, 9))
        starts = [0.0, *itertools.accumulate(1e3 * step.seconds for step in self.steps)]
        widths = [1e3 * step.seconds for step in self.steps]
        kinds = [step.kind.split(",")[0] if step.native else "PyTorch" for step in self.steps]
        times = {
            kind: sum(w for w, k in zip(widths, kinds, strict=True) if k == kind)
            for kind in dict.fromkeys(kinds)
        }
        largest = sorted(times, key=lambda kind: -times[kind])
        colors = {kind: f"C{i % 10}" for i, kind in enumerate(largest)} | {"PyTorch": "#555555"}
        edge = {"edgecolor": "white", "linewidth": 0.3}
        line.broken_barh(
            list(zip(starts, widths, strict=False)), (0, 1),
            facecolors=[colors[kind] for kind in kinds], **edge,
        )  # fmt: skip
        line.set(yticks=[], ylim=(0, 1), xlim=(0, starts[-1] or 1))
        line.set_title(
            f"{1e3 * self.seconds:.3f} ms on {self.threads} threads, "
            f"arena {_size(self.arena)}", loc="left", fontsize=10,
        )  # fmt: skip
        speed.bar(
            starts[:-1], [step.flops / 1e9 for step in self.steps], widths,
            align="edge", color=[colors[kind] for kind in kinds], **edge,
        )  # fmt: skip
        speed.axhline(self.peak / 1e9, color="#888888", linestyle=":")
        speed.annotate(
            "peak", (1, self.peak / 1e9), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8, color="#888888",
        )  # fmt: skip
        top = max([self.peak, *(step.flops for step in self.steps)])
        speed.set(ylabel="GFLOP/s", ylim=(0, 1.08e-9 * top))
        unit, name = (2**20, "MiB") if self.arena >= 2**20 else (2**10, "KiB")
        for block in self.blocks:
            start, end = starts[block.first], starts[block.last + 1]
            arena.broken_barh(
                [(start, end - start)], (block.offset / unit, block.size / unit),
                facecolor=colors[kinds[block.first]], alpha=0.75, **edge,
            )  # fmt: skip
        arena.set(ylabel=f"arena, {name}", xlabel="ms", ylim=(0, None))
        figure.legend(
            [Patch(color=colors[kind]) for kind in largest],
            [f"{kind}, {times[kind]:.3f} ms" for kind in largest],
            loc="outside right upper", frameon=False, fontsize=8,
        )  # fmt: skip
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
            f"arena {_size(self.arena)}, weights {_size(self.weights)}"
        ]
        for cut in self.cuts:
            time_, share = 1e3 * cut.seconds, cut.seconds / self.seconds
            why = cut.reason if cut.operator in cut.reason else f"{cut.operator} {cut.reason}"
            lines.append(f"  {cut.name}, {time_:.3f} ms ({share:.0%}), by PyTorch: {why}")
        return "\n".join(lines)


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


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
