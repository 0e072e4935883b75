"""The same features in two networks, read while both run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Feature:
    """Outputs of one module of the teacher, and where the student has them.

    Args:
        teacher, student: names of the modules.
        channels: the teacher's channel at each position of the student's.
    """

    teacher: str
    student: str
    channels: tuple[int, ...]


class Taps:
    """Reads features of a teacher and a student in their next forward passes.

    Args:
        teacher, student: the networks.
        features: which.
        apart: whether the student's gradients stop after each feature, so that what lies between
            two of them learns from its own feature alone.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, features: Sequence[Feature], *, apart: bool
    ) -> None:
        self.teacher, self.student, self.features, self.apart = teacher, student, features, apart
        self._wanted: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hooks on both networks for the block."""
        handles = []
        for feature in self.features:
            handles += [
                self.teacher.get_submodule(feature.teacher).register_forward_hook(
                    lambda _, args, output, name=feature.teacher: self._want(name, output)
                ),
                self.student.get_submodule(feature.student).register_forward_hook(
                    lambda _, args, output, name=feature.teacher: self._find(name, output)
                ),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(self) -> Tensor:
        """Squared errors of the features last read over their variances, the mean over features.

        What was read is forgotten.
        """
        errors = []
        for feature in self.features:
            index = torch.tensor(feature.channels, device=self._wanted[feature.teacher].device)
            wanted = self._wanted[feature.teacher].index_select(1, index)
            found = self._found[feature.teacher]
            errors.append(F.mse_loss(found, wanted) / wanted.var(correction=0).clamp_min(1e-12))
        self._wanted.clear()
        self._found.clear()
        return torch.stack(errors).mean()

    def _want(self, name: str, output: Tensor) -> None:
        # A copy: what follows may work in place.
        self._wanted[name] = output.detach().clone()

    def _find(self, name: str, output: Tensor) -> Tensor | None:
        self._found[name] = output.clone()
        return output.detach() if self.apart else None
