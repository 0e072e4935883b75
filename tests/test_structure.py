"""The house: which package may import which, and what users may count on."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import groupconv

SOURCE = Path(groupconv.__file__).parent

# From the ground up: a package may import those before it, and `models` and `data` stand by `nn`.
LEVELS = [
    {
        "errors",
        "files",
        "version",
        "timing",
        "busy",
        "events",
        "ranks",
        "store",
        "task",
        "observe",
        "memory_format",
    },
    {"kernels"},
    {"nn"},
    {"compiler"},
    {"models"},
    {"data"},
    {"targets"},
    {"report"},
    {"recovery"},
    {"optimize"},
    {"cli"},
]
# Modules of one package, in the order in which they may import each other. A package within a
# package has a place among the modules of the outer one, and an order of its own.
ORDER = {
    "kernels": [
        "spec", "reference", "machine", "flow", "emit", "activation", "blocks", "inputs", "tile",
        "forward", "staging", "module", "packing", "openmp", "jit", "cache", "kernel", "candidates",
        "tuning", "transposed", "parts", "peak", "fingerprint", "weights", "request", "native",
        "dispatch",
    ],
    "nn": ["checks", "dense", "functional", "conv", "explain", "shuffle", "blocks"],
    "compiler": [
        "filtering", "graph", "views", "building", "arguments", "elementwise", "spatial", "joins",
        "operators", "capture",
        "expression", "weights", "maps", "constants", "fold", "fuse", "reorder", "gather",
        "dissolve", "layout", "padding", "tidy", "passes",
        "steps", "memory", "library", "packed", "task", "convolve", "banded", "lower", "runner",
        "schedule", "session",
        "program", "algorithms", "profile", "records", "store", "watch", "compiled", "parts",
        "backend",
    ],
    "compiler/steps": [
        "step", "code", "entry", "channels", "window", "pool", "adaptive", "copy", "row",
        "functions", "map", "norm", "softmax", "shuffle", "gather", "pad", "relayout", "upsample",
        "transform", "to_tiles", "from_tiles", "bands",
    ],
    "models": [
        "biggan", "fashion_resnet", "shufflenet_v1", "stylegan2", "yolov3", "yolov3_weights",
    ],
    "data": ["images", "sample"],
    "targets": [
        "base", "quiet", "modulated", "program", "fold", "eager", "inductor", "native", "onnx_file",
        "onnx_int8", "onnxruntime", "openvino", "rewrites", "litert_convert",
        "litert_int8", "litert", "executorch", "mil_functions", "mil",
        "coreml", "verify", "export", "table", "alone", "bench",
    ],
    "report": ["pictures", "table", "page"],
    "recovery": [
        "loss", "features", "augment", "options", "lessons", "engine", "stages", "recover",
    ],
    "optimize": [
        "spaces", "ties", "values", "capture", "walk", "moves", "layers", "rules", "trace", "cost",
        "visit", "sampling", "wanted", "covariance", "moments", "partition", "orders", "schur",
        "exchange", "refine", "search", "fit", "structure", "kept", "prune", "pair", "menu",
        "align", "budget", "select", "latency", "bake", "fold", "convert", "objects", "evaluate",
        "importance", "sensitivity", "settle", "survey", "narrowing", "refit", "plan", "baselines",
        "job", "bracket", "choose", "planning", "beside", "summary", "finish", "start", "pipeline",
        "further", "study", "sweep",
    ],
    "cli": [
        "console", "watch", "options", "models", "outcome", "profile", "trace", "optimize", "plan",
        "apply", "recover", "report", "demo", "compile", "export", "bench", "explain", "cache",
        "doctor", "app",
    ],
}  # fmt: skip


def _imports(path: Path) -> list[str]:
    """Names below groupconv that a module imports, such as ``optimize.trace``."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("groupconv"):
            base = (node.module or "").split(".")[1:]
            names += [".".join([*base, alias.name]) if not base else ".".join(base)
                      for alias in node.names]  # fmt: skip
        elif isinstance(node, ast.Import):
            names += [
                alias.name.partition(".")[2] or "__init__"
                for alias in node.names
                if alias.name.split(".")[0] == "groupconv"
            ]
    return names


def _level(package: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if package in names)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_point_down(path: Path) -> None:
    package, *rest = path.relative_to(SOURCE).with_suffix("").parts
    if package in ("__init__", "__main__"):
        return
    for name in _imports(path):
        imported, _, module = name.partition(".")
        if imported == "__init__":
            assert package == "cli", f"{path}: only the command line uses the public package"
            continue
        assert _level(imported) <= _level(package), f"{path} imports {name}, which is above it"
        if imported == package and rest and rest[0] != "__init__" and module:
            inner = f"{package}/{rest[0]}"
            first, _, second = module.partition(".")
            if inner in ORDER and first == rest[0]:
                first, here, order = second, rest[1], ORDER[inner]
            else:
                here, order = rest[0], ORDER[package]
            if first and here != "__init__":
                assert order.index(first) < order.index(here), f"{path}: {name}"


@pytest.mark.parametrize("package", sorted(ORDER))
def test_every_module_has_its_place(package: str) -> None:
    folder = SOURCE / package
    inner = {p.parent.name for p in folder.glob("*/__init__.py")}
    modules = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    assert modules | inner == set(ORDER[package])


def test_public_names() -> None:
    assert groupconv.__all__ == [
        "ArgumentError",
        "Bench",
        "BudgetError",
        "BusyError",
        "DataError",
        "Explanation",
        "ExportError",
        "Exported",
        "GroupConvError",
        "Plan",
        "Profile",
        "Recovery",
        "Result",
        "__version__",
        "apply",
        "bench",
        "compile",
        "compile_parts",
        "explain",
        "export",
        "load",
        "load_compiled",
        "nn",
        "optimize",
        "plan",
        "profile",
        "recover",
        "sweep",
    ]
    assert groupconv.nn.__all__ == [
        "ChannelPermutation",
        "ChannelShuffle",
        "GroupConv1d",
        "GroupConv2d",
        "GroupConv3d",
        "GroupConvTranspose1d",
        "GroupConvTranspose2d",
        "GroupConvTranspose3d",
        "GroupedBottleneck",
        "InvertedResidual",
        "SeparableConv2d",
        "ShuffleUnit",
        "functional",
    ]
    assert groupconv.nn.functional.__all__ == [
        "channel_shuffle",
        "group_conv1d",
        "group_conv2d",
        "group_conv3d",
        "group_conv_transpose1d",
        "group_conv_transpose2d",
        "group_conv_transpose3d",
    ]
    for module in (groupconv, groupconv.nn, groupconv.nn.functional):
        assert all(hasattr(module, name) for name in module.__all__)


def test_import_starts_no_threads_and_no_heavy_libraries() -> None:
    code = """
import sys, threading
import torch
from pathlib import Path
def threads():
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()
before = threads()
import groupconv
assert threads() == before, (before, threads())
heavy = {"accelerate", "torchvision", "timm", "matplotlib", "onnx", "onnxruntime", "openvino"}
heavy |= {"typer"}
loaded = heavy & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True)
