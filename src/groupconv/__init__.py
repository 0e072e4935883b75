"""groupconv: a trained CNN goes in, a network of grouped convolutions comes out."""

from groupconv import nn
from groupconv.errors import ArgumentError, BudgetError, DataError, GroupConvError
from groupconv.optimize import Plan, Profile, Result, load, optimize, profile
from groupconv.version import __version__

__all__ = [
    "ArgumentError",
    "BudgetError",
    "DataError",
    "GroupConvError",
    "Plan",
    "Profile",
    "Result",
    "__version__",
    "load",
    "nn",
    "optimize",
    "profile",
]
