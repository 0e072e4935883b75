"""groupconv: a trained CNN goes in, a network of grouped convolutions comes out."""

from groupconv import nn
from groupconv.compiler.compiled import compile, load_compiled
from groupconv.compiler.parts import compile_parts
from groupconv.errors import (
    ArgumentError,
    BudgetError,
    BusyError,
    DataError,
    ExportError,
    GroupConvError,
)
from groupconv.nn.explain import Explanation, explain
from groupconv.optimize import (
    Plan,
    Profile,
    Result,
    apply,
    load,
    optimize,
    plan,
    profile,
    sweep,
)
from groupconv.recovery import Recovery, recover
from groupconv.targets import Bench, Exported, bench, export
from groupconv.version import __version__

__all__ = [
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
