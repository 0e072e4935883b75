"""Accuracy won back after conversion: the original network teaches the converted one."""

from groupconv.recovery.features import Feature
from groupconv.recovery.options import Loss, Recovery
from groupconv.recovery.recover import recover

__all__ = ["Feature", "Loss", "Recovery", "recover"]
