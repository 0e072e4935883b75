"""Accuracy won back after conversion: the original network teaches the converted one."""

from groupconv.recovery.features import Feature
from groupconv.recovery.options import Loss, Recovery

__all__ = ["Feature", "Loss", "Recovery"]
