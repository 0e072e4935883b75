"""How accuracy is won back: what a user can ask for."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from groupconv.data import Images
from groupconv.errors import ArgumentError

# Takes the outputs of the student and of the teacher, and labels or None; gives a scalar.
Loss = Callable[[Any, Any, Tensor | None], Tensor]


@dataclass(frozen=True)
class Recovery:
    """What is done after the refit, and with what.

    Args:
        time: "none"; "bn" to re-estimate batch norm only; or the time to learn for, such as "90s",
            "10min" or "1.5h".
        train: images to learn from, in any form that calibration images take; a DataLoader is used
            as it is, epoch after epoch. None: the calibration images. Classifiers learn from labels
            too, where there are any.
        loss: of the student's outputs, the teacher's, and the labels or None, instead of the
            default: a scalar tensor.
        augment: whether images are cropped and flipped at random; the teacher sees the same ones.
            None: they are where the network is a classifier of images.
        learning_rate: at its peak. None: up to 3e-3, less where little was lost, the time is
            short or batches are small.
        sync_batch_norm: whether batch norm takes its statistics over all processes, on GPUs.

    Raises:
        ArgumentError: an argument breaks its rule.
    """

    time: str = "none"
    train: Any = None
    loss: Loss | None = None
    augment: bool | None = None
    learning_rate: float | None = None
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        parse_time(self.time)
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ArgumentError(f"learning_rate={self.learning_rate!r} must be between 0 and 1")

    def described(self) -> str:
        """All that the result depends on, as text; a loader's images can't be told from others."""
        train = self.train
        if isinstance(train, Images):
            train = train.fingerprint()
        elif train is not None:
            train = f"{type(train).__qualname__} of {len(train)} batches"
        loss = getattr(self.loss, "__qualname__", None)
        values = (self.time, train, loss, self.augment, self.learning_rate, self.sync_batch_norm)
        return repr(values)

    @property
    def seconds(self) -> float | None:
        """Of learning: None for "none", 0 for "bn"."""
        return parse_time(self.time)


def parse_time(text: str) -> float | None:
    """Seconds of learning: None for "none", 0 for "bn", else the time in the text.

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
