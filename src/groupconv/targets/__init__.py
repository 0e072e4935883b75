"""Runtimes: where latency is measured and models are sent."""

from groupconv.errors import ArgumentError
from groupconv.targets.base import Target
from groupconv.targets.bench import Bench, bench
from groupconv.targets.export import FILE_TARGETS, Exported, export
from groupconv.targets.table import LatencyTable

_TARGETS: dict[str, Target] = {target.name: target for target in FILE_TARGETS}


def get_target(name: str) -> Target:
    """The target called ``name``, to measure time on.

    Raises:
        ArgumentError: there is none of that name, or time can't be measured here.
    """
    target = _TARGETS.get(name)
    if target is None:
        raise ArgumentError(f"target={name!r} must be one of {', '.join(_TARGETS)}")
    reason = target.why_not_timed()
    if reason is not None:
        raise ArgumentError(f"target={name!r} can't be used here: {reason}")
    return target


__all__ = ["Bench", "Exported", "LatencyTable", "Target", "bench", "export", "get_target"]
