"""How far a student is from its teacher, whatever the network returns."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from groupconv.errors import ArgumentError

_TEMPERATURE = 4.0
# Share of the labels in the loss of a classifier; the teacher's word has the rest.
_LABELS = 0.5


def distance(student: Any, teacher: Any, labels: Tensor | None) -> Tensor:
    """The distillation loss of a batch.

    Classes (outputs of shape ``(N, classes)``) by the KL divergence at a temperature of 4 (Hinton
    et al. 2015, https://arxiv.org/abs/1503.02531), together with the cross-entropy where there are
    labels; any other tensor by its squared error over the variance of the teacher's.

    Args:
        student, teacher: what the networks return, tensors in any nesting.
        labels: ``(N,)`` class numbers, or ``(N, classes)`` shares of them, or None.

    Returns:
        a scalar, the mean over the tensors.

    Raises:
        ArgumentError: the networks return no floating-point tensors of equal shapes.
    """
    pairs = comparable(student, teacher)
    if not pairs:
        raise ArgumentError(
            "loss=None can't compare what the networks return: no floating-point tensors of the "
            "same shape; give a loss of their outputs"
        )
    classes = is_classes(student)
    return torch.stack([_one(mine, other, labels, classes) for mine, other in pairs]).mean()


def comparable(student: Any, teacher: Any) -> list[tuple[Tensor, Tensor]]:
    """Tensors of what two networks return that can be set beside each other."""
    mine, others = ([x for x in tree_leaves(out) if _floats(x)] for out in (student, teacher))
    if [x.shape for x in mine] != [x.shape for x in others]:
        return []
    return list(zip(mine, others, strict=True))


def is_classes(output: Any) -> bool:
    """Whether a network returns scores of classes, ``(N, classes)``, and nothing else."""
    leaves = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
    return (
        len(leaves) == 1 and _floats(leaves[0]) and leaves[0].ndim == 2 and leaves[0].shape[1] > 1
    )


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _one(student: Tensor, teacher: Tensor, labels: Tensor | None, classes: bool) -> Tensor:
    if not classes:
        return F.mse_loss(student, teacher) / teacher.var(correction=0).clamp_min(1e-12)
    soft = F.kl_div(
        F.log_softmax(student / _TEMPERATURE, 1),
        F.log_softmax(teacher / _TEMPERATURE, 1),
        reduction="batchmean",
        log_target=True,
    )
    # The gradients of soft targets shrink with the square of the temperature.
    soft = soft * _TEMPERATURE**2
    if labels is None:
        return soft
    return (1 - _LABELS) * soft + _LABELS * F.cross_entropy(student, labels)
