"""The optimizer: which layers, how many groups, which channels, what weights."""

from groupconv.optimize.cost import Profile, profile
from groupconv.optimize.finish import Result
from groupconv.optimize.pipeline import apply, optimize, plan
from groupconv.optimize.plan import Plan, load
from groupconv.optimize.sweep import sweep

__all__ = ["Plan", "Profile", "Result", "apply", "load", "optimize", "plan", "profile", "sweep"]
