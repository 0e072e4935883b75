"""What every engine of a benchmark offers, how it is checked and timed, and changes of form."""

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from groupconv.kernels.spec import ConvSpec
from groupconv.timing import Timing, interleave

# Seconds for which the threads of libgomp wait actively by default, and some.
OPENMP_SPIN = 0.015


@dataclass(frozen=True)
class Ready:
    """One engine, its weights packed and its input laid out, about to run.

    Args:
        run: one forward pass; of a convolution, torch's engines expect to be inside
            ``torch.inference_mode``.
        output: one more pass, whose result it returns as ``(N, C, *output_size)``; that of a 1-d
            convolution may have a row axis of size 1.
        layout: in which form the engine takes and gives its images.
        spin: seconds that its worker threads stay busy after a pass, waiting for the next one.
        kept: memory that a pass works in and that nothing else holds.
    """

    run: Callable[[], object]
    output: Callable[[], Tensor]
    layout: str
    spin: float = 0.0
    kept: object = None


# (spec, weight, bias, input as contiguous (N, C, *), threads) -> the engine, or why it can't run.
Prepare = Callable[[ConvSpec, Tensor, Tensor | None, Tensor, int], Ready | str]


def missing(*modules: str) -> str | None:
    """Why the first of ``modules`` that can't be imported can't be, or None."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{module} can't be imported: {error}"
    return None


def unsupported(spec: ConvSpec) -> str | None:
    """Why a convolution is outside the comparison, or None."""
    if spec.transposed or len(spec.input_size) == 3:
        return "only 1-d and 2-d convolutions are compared"
    return None


def as_2d(spec: ConvSpec, weight: Tensor, input: Tensor) -> tuple[ConvSpec, Tensor, Tensor]:
    """A 1-d convolution as a 2-d one on images of one row; a 2-d one as it is."""
    if len(spec.input_size) == 2:
        return spec, weight, input
    lifted = dataclasses.replace(
        spec,
        input_size=(1, *spec.input_size),
        kernel_size=(1, *spec.kernel_size),
        # A single row comes out at any stride, and LiteRT wants both alike.
        stride=spec.stride * 2,
        padding=((0, 0), *spec.padding),
        dilation=spec.dilation * 2,
    )
    return lifted, weight.unsqueeze(2), input.unsqueeze(2)


def symmetric(spec: ConvSpec) -> bool:
    return all(before == after for before, after in spec.padding)


def padded(spec: ConvSpec, input: Tensor) -> tuple[ConvSpec, Tensor]:
    """The same convolution without padding, on an input that has it already."""
    size = tuple(n + sum(pair) for n, pair in zip(spec.input_size, spec.padding, strict=True))
    none = ((0, 0),) * len(size)
    pads = [n for pair in reversed(spec.padding) for n in pair]
    return dataclasses.replace(spec, input_size=size, padding=none), F.pad(input, pads)


def fastest(variants: Mapping[str, Ready]) -> Ready:
    """The best of several ways to ask one engine."""
    if len(variants) == 1:
        return next(iter(variants.values()))
    times = interleave({name: v.run for name, v in variants.items()}, seconds=0.1, min_runs=3)
    return variants[min(times, key=lambda name: times[name].median)]


def wrong(output: Tensor, reference: Tensor, tolerance: float) -> str | None:
    """What is wrong with an engine's output, or None.

    Args:
        tolerance: largest error over the root mean square of the reference.
    """
    if output.numel() != reference.numel():
        return f"WRONG: shape {tuple(output.shape)}, not {tuple(reference.shape)}"
    # A 1-d convolution may come back as one row.
    difference = output.double().reshape(reference.shape) - reference
    error = float(difference.abs().max() / reference.double().square().mean().sqrt())
    return None if error <= tolerance else f"WRONG: error {error:.1e} of the root mean square"


def time_in_turn(
    ready: Mapping[str, Ready], *, seconds: float, threads: int, warm_passes: int
) -> dict[str, Timing]:
    """Time all engines in one interleaved run, each after ``warm_passes`` untimed passes."""
    # Threads that slept are first put on one core, and need some ms to spread over all.
    warm_up = 0.02 if threads > 1 else 0.0
    calls: dict[str, Callable[[], object]] = {}
    for name, engine in ready.items():
        # Untimed passes first: caches hold what this engine uses, its threads are awake, and it
        # doesn't matter which engine came before.
        calls[f"{name} warms up"] = functools.partial(_repeat, engine.run, warm_passes, warm_up)
        calls[name] = engine.run
        if engine.spin:
            # Threads that wait actively for more work would take the next engine's processors.
            calls[f"{name} rests"] = functools.partial(time.sleep, engine.spin)
    runs = 11 if threads > 1 else 5
    times = interleave(calls, seconds=seconds, min_runs=runs, max_runs=10_000)
    return {name: times[name] for name in ready}


def _repeat(call: Callable[[], object], times: int, seconds: float) -> None:
    end = time.perf_counter() + seconds
    for _ in range(times):
        call()
    while time.perf_counter() < end:
        call()
