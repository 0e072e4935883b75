"""The convolutions that benchmarks run: one CSV file per network, one row per distinct layer."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from groupconv.kernels.spec import ConvSpec

FOLDER = Path(__file__).parent / "shapes"
_COLUMNS = (
    "batch", "in_channels", "out_channels", "groups", "input", "kernel", "stride", "padding",
    "dilation", "count",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One distinct convolution of a network.

    Args:
        network: the name of its file.
        spec: the convolution on the size of input that it meets there.
        count: times it occurs in the network.
    """

    network: str
    spec: ConvSpec
    count: int

    @property
    def width(self) -> int:
        """Input channels per group."""
        return self.spec.in_channels // self.spec.groups

    @property
    def flops(self) -> int:
        """Two for each multiply-add that is needed: taps that fall on padding are left out.

        (``spec.macs`` counts them.) The bias is not counted.
        """
        c = self.spec
        axes = zip(
            c.input_size, c.output_size, c.kernel_size, c.stride, c.padding, c.dilation, strict=True
        )
        taps = math.prod(
            sum(0 <= o * s - before + k * d < n for o in range(out) for k in range(kernel))
            for n, out, kernel, s, (before, _), d in axes
        )
        return 2 * c.batch * c.out_channels * self.width * int(taps)

    @property
    def bytes(self) -> int:
        """Of input, output, weights and bias in float32."""
        c = self.spec
        values = (
            c.batch * c.in_channels * math.prod(c.input_size)
            + c.batch * c.out_channels * math.prod(c.output_size)
            + math.prod(c.weight_shape)
            + c.out_channels
        )
        return 4 * values

    @property
    def layer(self) -> str:
        """The convolution in words."""
        c = self.spec
        sizes = _sizes((c.batch, c.in_channels, *c.input_size))
        text = f"{sizes} to {c.out_channels}, {_sizes(c.kernel_size)}"
        if set(c.stride) != {1}:
            text += f" / {_sizes(c.stride)}"
        if set(c.dilation) != {1}:
            text += f", dilation {_sizes(c.dilation)}"
        return f"{text}, groups {c.groups}"

    def __str__(self) -> str:
        return f"{self.network}: {self.layer}"


def read(path: str | Path) -> list[Shape]:
    """The shapes of one file, in its order.

    Raises:
        ArgumentError: a row is not a legal convolution.
    """
    path = Path(path)
    with path.open(newline="") as file:
        return [Shape(path.stem, _spec(row), int(row["count"])) for row in csv.DictReader(file)]


def write(path: str | Path, shapes: Iterable[Shape]) -> None:
    """One row per shape; ``path`` names the network."""
    with Path(path).open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(_COLUMNS)
        for shape in shapes:
            c = shape.spec
            padding = "x".join(str(a) if a == b else f"{a}:{b}" for a, b in c.padding)
            rows.writerow(
                (
                    c.batch, c.in_channels, c.out_channels, c.groups, _sizes(c.input_size),
                    _sizes(c.kernel_size), _sizes(c.stride), padding, _sizes(c.dilation),
                    shape.count,
                )
            )  # fmt: skip


def _spec(row: dict[str, str]) -> ConvSpec:
    pads = []
    for axis in row["padding"].split("x"):
        before, _, after = axis.partition(":")
        pads.append((int(before), int(after or before)))
    return ConvSpec(
        batch=int(row["batch"]),
        in_channels=int(row["in_channels"]),
        out_channels=int(row["out_channels"]),
        input_size=_ints(row["input"]),
        kernel_size=_ints(row["kernel"]),
        stride=_ints(row["stride"]),
        padding=tuple(pads),
        dilation=_ints(row["dilation"]),
        groups=int(row["groups"]),
    )


def _sizes(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))
