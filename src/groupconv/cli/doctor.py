"""``groupconv doctor``: what the kernels find on this machine, and whether they work."""

import math
import os
import time
from typing import Any

import llvmlite.binding as llvm
import torch

from groupconv.cli.console import JsonFlag, people, print_json
from groupconv.errors import GroupConvError
from groupconv.kernels import cache, dispatch, openmp
from groupconv.kernels.machine import Machine, runnable
from groupconv.kernels.native import Native
from groupconv.kernels.reference import group_conv_reference
from groupconv.kernels.request import Request
from groupconv.kernels.spec import ConvSpec
from groupconv.timing import interleave, machine

# A layer of ResNeXt-50 32x4d.
_LAYER = ConvSpec(1, 128, 128, (56, 56), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 32)
_SETTINGS = ("GROUPCONV_CACHE", "GROUPCONV_NATIVE", "GROUPCONV_TUNE")


def doctor(json: JsonFlag = False) -> None:
    """Show instruction sets, threads, cache and settings, and check a kernel on this machine."""
    pool, kept = openmp.pool(), cache.why_not()
    found: dict[str, Any] = {
        "machine": machine(),
        "llvm": ".".join(map(str, llvm.llvm_version_info)),
        "instruction_sets": [m.name for m in runnable()],
        "openmp": pool.path if pool else None,
        "threads": openmp.threads(),
        "cache": {"folder": cache.place(), "unused": kept},
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "order": [way.name for way in dispatch.TABLE],
    }
    if runnable():
        found["check"] = _check(runnable()[0])
    if json:
        print_json(found)
    else:
        _print(found)
    if not runnable():
        raise GroupConvError("no code can be generated for this processor: PyTorch's kernels run")
    if not found["check"]["right"]:
        raise GroupConvError(f"a kernel is wrong by {found['check']['error']} on this machine")


def _check(best: Machine) -> dict[str, Any]:
    """One layer on a kernel: is it right, how long does it take, and PyTorch?"""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 128, 56, 56, generator=random)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(_LAYER.weight_shape, generator=random) / 6
    begun = time.perf_counter()
    native = Native(Request(_LAYER, torch.float32, True, True, dense=True, bias=False))
    ready = time.perf_counter() - begun
    error = (native(x, weight, None) - group_conv_reference(_LAYER, x, weight)).abs().max().item()
    times = interleave(
        {
            "native": lambda: native(x, weight, None),
            "aten": lambda: dispatch.aten(_LAYER, x, weight, None),
        },
        seconds=0.3,
    )
    return {
        "layer": "128 channels, 56x56, 3x3, 32 groups",
        "instruction_set": best.name,
        "error": error if math.isfinite(error) else None,
        "right": error < 1e-5,
        "ready_after": ready,
        "latency": {name: timing.median for name, timing in times.items()},
    }


def _print(found: dict[str, Any]) -> None:
    def show(name: str, value: object) -> None:
        people.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)

    show("processor", found["machine"]["processor"])
    show("instruction sets", ", ".join(found["instruction_sets"]) or "none that is known")
    show("LLVM", found["llvm"])
    show("threads", f"{found['threads']} of {found['openmp'] or 'no OpenMP runtime was found'}")
    show("cache", found["cache"]["folder"])
    if found["cache"]["unused"]:
        show("cache is not used", found["cache"]["unused"])
    for name, value in found["settings"].items():
        show(name, value)
    show("implementations, in this order", ", ".join(found["order"]))
    if "check" in found:
        check = found["check"]
        times = ", ".join(f"{name} {t * 1e6:.0f} us" for name, t in check["latency"].items())
        show("checked", f"{check['layer']}: {'right' if check['right'] else 'WRONG'}, {times}")
        show("first use", f"{check['ready_after'] * 1e3:.0f} ms")
