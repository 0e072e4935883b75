"""Accuracy back after conversion: batch norm re-estimated, then a short distillation.

Neither needs labels: the original network is the teacher.
"""

import math
import re
import time
from collections.abc import Callable, Iterable
from itertools import chain, count

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from groupconv.errors import ArgumentError
from groupconv.optimize.evaluate import run

_LEARNING_RATE = 1e-3
_TEMPERATURE = 4.0


def parse_recover(text: str) -> float | None:
    """Seconds of distillation: None for "none", 0 for "bn", else the time in the text.

    Raises:
        ArgumentError: the text is neither "none", "bn" nor a time such as "90s" or "10min".
    """
    if text == "none":
        return None
    if text == "bn":
        return 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|min|h)", text)
    if match is None:
        raise ArgumentError(f'recover={text!r} must be "none", "bn" or a time such as "10min"')
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Replace the statistics of every batch norm by those of the converted activations."""
    training = model.training
    update_bn(batches, model)
    model.train(training)


def distil(
    teacher: nn.Module,
    student: nn.Module,
    batches: Callable[[int], Iterable[Tensor]],
    seconds: float,
) -> int:
    """Train the student to give the teacher's outputs, for a given time.

    Classifiers (outputs of shape ``(N, classes)``) learn by KL divergence at a temperature of 4
    (Hinton et al. 2015, https://arxiv.org/abs/1503.02531), anything else by squared error.

    Args:
        teacher: in evaluation mode.
        student: trained in place; left in evaluation mode.
        batches: epoch number to batches of images, shuffled.
        seconds: wall time to spend.

    Returns:
        Steps done.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=_LEARNING_RATE, weight_decay=1e-4)
    start, steps = time.perf_counter(), 0
    student.train()
    for batch in chain.from_iterable(map(batches, count())):
        done = (time.perf_counter() - start) / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            # Cosine over the time there is: the number of steps isn't known beforehand.
            group["lr"] = _LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * done))
        with torch.no_grad():
            target = run(teacher, batch)
        loss = _distance(run(student, batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    student.eval()
    return steps


def _distance(output: Tensor, target: Tensor) -> Tensor:
    if output.ndim != 2:
        return F.mse_loss(output, target)
    return F.kl_div(
        F.log_softmax(output / _TEMPERATURE, 1),
        F.log_softmax(target / _TEMPERATURE, 1),
        reduction="batchmean",
        log_target=True,
    )
