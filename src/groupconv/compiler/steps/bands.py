"""Minimal filtering from images to images, some lines of tiles at a time."""

from dataclasses import dataclass
from typing import ClassVar

from groupconv.compiler.steps import entry
from groupconv.compiler.steps.step import Step
from groupconv.kernels import module
from groupconv.kernels.emit import Emitter
from groupconv.kernels.flow import Value
from groupconv.kernels.machine import Machine


@dataclass(frozen=True)
class BandsStep(Step):
    """Calls a :class:`ToTilesStep`, the kernel of its products, and a :class:`FromTilesStep` on one
    band after another; what is between them stays in memory of the thread's own.

    Args:
        down: lines of tiles of an image.
        lines: of a band; they divide those of all images.
        tiles, products: elements of a band before and after the products.
        matrices: numbers of a tile.
        rows, blocks: of the kernel's tile.
        x_image, y_image, w_image: from one of the matrices to the next: see ``module.RECORD``.
    """

    down: int
    lines: int
    tiles: int
    products: int
    matrices: int
    rows: int
    blocks: int
    x_image: int
    y_image: int
    w_image: int

    arguments: ClassVar[tuple[str, ...]] = (
        "inward", "multiply", "outward", "buffer", "x", "w", "bias", "residual", "y", "images",
    )  # fmt: skip

    @property
    def share(self) -> int:
        """Elements that each thread needs for itself."""
        return self.matrices * (self.x_image + self.y_image)

    @property
    def bytes(self) -> int:
        return 4 * self.share * self.down // self.lines

    def write(self, machine: Machine, name: str) -> str:
        return entry.module(machine, name, self.arguments, self._body)

    def _body(self, e: Emitter) -> None:
        bands = e.div(e.mul("%images", self.down), self.lines)
        tiles = e.offset("%buffer", e.mul("%thread", self.share))
        products = e.offset(tiles, self.matrices * self.x_image)
        inward = _record(e, ["%x", tiles, "%images"])
        fixed: dict[str, Value] = {
            "x": tiles, "w": "%w", "y": products, "images": self.matrices, "rows": self.rows,
            "blocks": self.blocks, "x_image": self.x_image, "y_image": self.y_image,
            "w_image": self.w_image,
        }  # fmt: skip
        multiply = _record(e, [fixed.get(name, 0) for name in module.RECORD])
        outward = _record(e, [products, "%bias", "%residual", "%y", "%images"])
        with e.loop(*entry.part(e, bands)) as band:
            # The steps count lines from the first one of all.
            _put(e, inward, 1, e.offset(tiles, e.sub(0, e.mul(band, self.tiles))))
            _put(e, outward, 0, e.offset(products, e.sub(0, e.mul(band, self.products))))
            e.do(f"call void %inward(ptr {inward}, i64 {band}, i64 {bands})")
            e.do(f"call void %multiply(ptr {multiply}, i64 0, i64 1)")
            e.do(f"call void %outward(ptr {outward}, i64 {band}, i64 {bands})")


def _record(e: Emitter, values: list[Value]) -> str:
    """Memory of eight bytes for each of ``values``, which are put there."""
    record = e.let(f"alloca [{len(values)} x i64]")
    for i, value in enumerate(values):
        _put(e, record, i, value)
    return record


def _put(e: Emitter, record: str, index: int, value: Value) -> None:
    place = e.let(f"getelementptr i64, ptr {record}, i64 {index}")
    kind = "i64" if isinstance(value, int) or value == "%images" else "ptr"
    e.do(f"store {kind} {value}, ptr {place}")
