"""Networks of the literature through the whole job: ``python -m benchmarks.systems``.

Each is built, counted against its paper, optimized for one target (``native``), timed before and
after in several runtimes, and written for others. Weights are random unless ``--weights`` has a
file ``NAME.safetensors``, and a network of random weights loses more than a trained one would;
images are random too without ``--photos``.

``--json`` keeps what was found, ``--page`` writes it as a page of Markdown. The exit status is 1 if
a count is not the paper's, a budget does not hold, or a file is wrong.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

import groupconv
from benchmarks.literature import SYSTEMS, System
from benchmarks.provenance import commit, versions
from groupconv.data import load_images
from groupconv.errors import ArgumentError, BudgetError, ExportError
from groupconv.files import write_text
from groupconv.targets import get_target
from groupconv.task import AGREEMENT
from groupconv.timing import TURN, interleave, machine

NATIVE = "native"
RUNTIMES = (NATIVE, "onnxruntime", "openvino")
SUFFIXES = (".groupconv", ".onnx", ".tflite", ".mlpackage")
_LIBRARIES = (
    "torch", "torchvision", "timm", "onnxruntime", "openvino", "litert-torch", "coremltools",
)  # fmt: skip
# How far a count may be from a paper's, which rounds and leaves out small layers.
_CLOSE = 0.04
_SECONDS = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if something doesn't hold."""
    options = _arguments(arguments)
    console = Console(width=160)
    record = {
        "machine": machine(),
        "versions": versions(_LIBRARIES),
        **commit(),
        "settings": {key: str(value) for key, value in vars(options).items()},
    }
    rows: list[dict[str, Any]] = []
    for name in options.systems:
        row = run(name, options)
        rows.append(row)
        console.print(_table([row]))
        for fault in faults(row):
            console.print(f"{name}: {fault}")
        # After each system: an hour's work must not hang on the last one.
        if options.json:
            write_text(options.json, json.dumps({**record, "systems": rows}, indent=1) + "\n")
        if options.page:
            write_text(options.page, page(rows))
    return int(any(faults(row) for row in rows))


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One system's row."""
    start = time.perf_counter()
    system = SYSTEMS[name]
    net = system.build(options.small)
    weights = options.weights and options.weights / f"{name}.safetensors"
    trained = bool(weights and weights.exists())
    if trained:
        net.load_state_dict(load_file(weights))
    inputs = _inputs(system, options)
    one = inputs[:1]
    row: dict[str, Any] = {
        "system": name,
        "input": list(one.shape[1:]),
        "trained": trained,
        "macs": groupconv.profile(net, one, latency=False).macs,
        "params": sum(parameter.numel() for parameter in net.parameters()),
        "paper": None if options.small else {"macs": system.macs, "params": system.params},
    }
    keep = [*system.keep, *(system.small_keep if options.small else ())]
    try:
        result = groupconv.optimize(
            net,
            inputs,
            budget=options.budget or (system.small_budget if options.small else system.budget),
            target=options.target,
            keep=keep,
            recover=options.recover,
        )
    except BudgetError as error:
        return row | {"refused": str(error), "seconds": time.perf_counter() - start}
    report = result.report
    row |= {
        "refused": None,
        "macs_after": report["macs"]["after"],
        "params_after": report["params"]["after"],
        "layers": {
            layer["name"]: layer["structure"]
            for layer in report["layers"]
            if layer["structure"] != layer["was"]
        },
        "task": report["task"],
        "agreement": report["agreement"],
        "overlap": report["overlap"],
        "output_error": report["output_error"],
        "psnr": report["psnr"],
        "steps": report["seconds"],
        # Checked first, then timed.
        "files": {
            s: exported(result.model, one, inputs[1:3], s)
            for s in (() if system.finds else options.suffixes)
        },
        "times": times(
            {"before": net, "after": result.model},
            one,
            (NATIVE, "eager") if system.finds else options.runtimes,
        ),
        "seconds": time.perf_counter() - start,
    }
    return row


def _inputs(system: System, options: argparse.Namespace) -> Tensor:
    if options.photos is None or system.latents is not None:
        return system.inputs(options.small)
    size = system.small_size if options.small else system.size
    return load_images(options.photos, limit=options.images, image_size=size).images


def times(
    networks: Mapping[str, nn.Module], x: Tensor, runtimes: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Runtime to the seconds of each network there, all in one interleaved run."""
    targets = {runtime: get_target(runtime) for runtime in runtimes}
    calls = {
        f"{runtime} {name}": target.build(net, (x,))
        for runtime, target in targets.items()
        for name, net in networks.items()
    }
    rest = max(target.rest for target in targets.values())
    found = interleave(calls, seconds=_SECONDS, min_runs=7, max_runs=400, rest=rest, turn=TURN)
    return {
        runtime: {name: found[f"{runtime} {name}"].median for name in networks}
        for runtime in runtimes
    }


def exported(net: nn.Module, x: Tensor, others: Tensor, suffix: str) -> dict[str, Any]:
    """The file of one format, checked in its runtime, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = groupconv.export(net, x, Path(folder) / f"net{suffix}", images=others)
        except (ArgumentError, ExportError) as error:
            return {"refused": str(error)}
    return {"refused": None, "bytes": found.bytes, "largest_difference": found.agreement.largest}


def faults(row: Mapping[str, Any]) -> list[str]:
    """What doesn't hold, for people."""
    found = []
    for count, expected in (row["paper"] or {}).items():
        if expected and abs(row[count] / expected - 1) > _CLOSE:
            found.append(f"{row[count]:,} {count}, {expected:,.0f} in the paper")
    if row["refused"]:
        return [*found, row["refused"]]
    found += [f"{s}: {file['refused']}" for s, file in row["files"].items() if file["refused"]]
    return found


def speedups(row: Mapping[str, Any]) -> tuple[float, float]:
    """On ``native`` against the original there, and against it on the fastest other runtime."""
    after = row["times"][NATIVE]["after"]
    peers = [time["before"] for name, time in row["times"].items() if name != NATIVE]
    return row["times"][NATIVE]["before"] / after, min(peers, default=float("nan")) / after


_COLUMNS = (
    "system", "M MACs", "M params", "after", "native ms", "after", "faster", "than the best peer",
    "onnxruntime ms", "after", "likeness", "files",
)  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """A line of the table."""
    counts = [row["system"], f"{row['macs'] / 1e6:,.0f}", f"{row['params'] / 1e6:.2f}"]
    if row["refused"]:
        return [*counts, *[""] * 7, f"refused: {row['refused']}", ""]
    native, onnx = (row["times"].get(name) for name in (NATIVE, "onnxruntime"))
    own, peer = speedups(row)
    kept = [s.removeprefix(".") for s, file in row["files"].items() if not file["refused"]]
    return [
        *counts,
        f"{100 * row['macs_after'] / row['macs']:.0f}% of the MACs",
        *(f"{1e3 * native[name]:.2f}" for name in ("before", "after")),
        f"{own:.2f}x",
        f"{peer:.2f}x",
        *(f"{1e3 * onnx[name]:.2f}" if onnx else "" for name in ("before", "after")),
        likeness(row),
        ", ".join(kept),
    ]


def likeness(row: Mapping[str, Any]) -> str:
    """How near the outputs stay."""
    if row["psnr"] is not None:
        return f"PSNR {row['psnr']:.1f} dB"
    if row["agreement"] is not None:
        return f"{AGREEMENT[row['task']]} {100 * row['agreement']:.0f}%"
    return f"output error {row['output_error']:.3f}"


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table, and what was refused."""
    lines = [
        "# Networks of the literature",
        "",
        "Made by `python -m benchmarks.systems`; one image per pass. Networks that are not marked "
        "as trained have random weights, which no structure fits well: their likeness is a lower "
        "bound, their times are what they are.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
        *("| " + " | ".join(cells(row)) + " |" for row in rows),
        "",
        *(f"- {row['system']}: {fault}" for row in rows for fault in faults(row)),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*cells(row))
    return table


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("systems", nargs="*", help=f"of {', '.join(SYSTEMS)}; default: all")
    parser.add_argument("--small", action="store_true", help="small networks by the same code")
    parser.add_argument("--budget", help="default: of each system its own")
    parser.add_argument("--target", default=NATIVE, help="what the network is optimized for")
    parser.add_argument("--recover", default="none")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="of NAME.safetensors")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="to calibrate on")
    parser.add_argument("--images", type=int, default=256, help="of --photos")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES), metavar="NAME,...")
    parser.add_argument("--suffixes", default=",".join(SUFFIXES), metavar="SUFFIX,...")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--page", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    options.systems = options.systems or list(SYSTEMS)
    for name in options.systems:
        if name not in SYSTEMS:
            parser.error(f"system {name!r} must be one of {', '.join(SYSTEMS)}")
    options.runtimes = options.runtimes.split(",")
    options.suffixes = [suffix for suffix in options.suffixes.split(",") if suffix]
    torch.manual_seed(0)
    return options


if __name__ == "__main__":
    sys.exit(main())
