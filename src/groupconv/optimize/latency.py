"""Measured time of every candidate of a layer, against the dense layer in the same run."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from groupconv.kernels.spec import ConvSpec
from groupconv.nn import ChannelPermutation
from groupconv.optimize.structure import Candidate, Menu
from groupconv.targets import LatencyTable, Target

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SECONDS = 0.1


def layer_times(
    menus: Mapping[str, Menu], target: Target, table: LatencyTable, batch: int
) -> dict[str, list[float]]:
    """Seconds of every candidate, for ``batch`` images per call.

    Args:
        menus: by layer.
        target: runtime to measure on.
        table: of times known already; grows.
        batch: images per call.

    Returns:
        layer name to one time per candidate, explicit permutations included.
    """
    return {
        name: _menu_times([_at_batch(c, batch) for c in menu.candidates], target, table)
        for name, menu in menus.items()
    }


def _menu_times(candidates: list[Candidate], target: Target, table: LatencyTable) -> list[float]:
    dense = candidates[0].spec
    builds: dict[str, Callable[[], Callable[[], object]]] = {}
    parts: list[list[str]] = []
    for candidate in candidates:
        spec = candidate.spec
        key = f"{target.name} {_describe(spec)}"
        builds[key] = lambda spec=spec: _build_conv(target, spec)  # type: ignore[misc]
        used = [key]
        for wanted, channels, size in (
            (candidate.permute_in, dense.in_channels, dense.input_size),
            (candidate.permute_out, dense.out_channels, dense.output_size),
        ):
            if wanted:
                shape = (dense.batch, channels, *size)
                key = f"{target.name} permute {'x'.join(map(str, shape))}"
                builds[key] = lambda shape=shape: _build_permutation(target, shape)  # type: ignore[misc]
                used.append(key)
        parts.append(used)
    times = table.measure(builds, seconds=_SECONDS)
    return [sum(times[key].median for key in used) for used in parts]


def _build_conv(target: Target, spec: ConvSpec) -> Callable[[], object]:
    # Only padding="same" with an even kernel pads the two ends unequally.
    uneven = any(before != after for before, after in spec.padding)
    conv = _CONVS[len(spec.input_size) - 1](
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,  # type: ignore[arg-type]
        stride=spec.stride,  # type: ignore[arg-type]
        padding="same" if uneven else [a for a, _ in spec.padding],  # type: ignore[arg-type]
        dilation=spec.dilation,  # type: ignore[arg-type]
        groups=spec.groups,
    )
    x = torch.randn(spec.batch, spec.in_channels, *spec.input_size)
    return target.build(conv.eval(), (x,))


def _build_permutation(target: Target, shape: tuple[int, ...]) -> Callable[[], object]:
    # Reversed: an order that can't be served by one run of memory.
    permutation = ChannelPermutation(torch.arange(shape[1]).flip(0))
    return target.build(permutation, (torch.randn(shape),))


def _at_batch(candidate: Candidate, batch: int) -> Candidate:
    return replace(candidate, spec=replace(candidate.spec, batch=batch))


def _describe(spec: ConvSpec) -> str:
    def numbers(values: tuple[int, ...]) -> str:
        return "x".join(map(str, values))

    return (
        f"conv {spec.in_channels}->{spec.out_channels} k{numbers(spec.kernel_size)} "
        f"s{numbers(spec.stride)} p{numbers(tuple(a for a, _ in spec.padding))} "
        f"d{numbers(spec.dilation)} g{spec.groups} @{spec.batch}x{numbers(spec.input_size)}"
    )
