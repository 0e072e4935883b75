"""The optimizer: which layers, how many groups, which channels, what weights."""

from groupconv.optimize.cost import Profile, profile
from groupconv.optimize.pipeline import Result, optimize
from groupconv.optimize.plan import Plan, load

__all__ = ["Plan", "Profile", "Result", "load", "optimize", "profile"]
