"""The training loop, on one process or many: Hugging Face accelerate does the spreading."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from groupconv import events, ranks
from groupconv.errors import ArgumentError
from groupconv.store import Store

log = logging.getLogger(__name__)

_WEIGHT_DECAY = 1e-4
# Gradients longer than this are shortened: a cut network's first steps are its steepest.
_CLIP = 5.0
_WARM_UP = 0.05
# The learning rate at its peak, for a loss of 1 at the beginning, so many steps or more, and so
# many images a batch or more. A student that has lost little is thrown back by steps as long as one
# that has lost all needs, and so is one that learns from small batches, whose gradients are noisy
# (Goyal et al. 2017, https://arxiv.org/abs/1706.02677).
_RATE, _LEAST_RATE, _LONG, _FULL = 3e-3, 3e-4, 500, 64
# The average looks back over this share of the steps.
_MEMORY = 0.02
# The student is scored so often, if that takes no more than this share of the time, and learning
# ends after so many scores without a lower one. Those of the first half don't count: while the
# learning rate is high nothing is gained, and it comes back as the rate falls.
_CHECKS, _CHECKS_SHARE, _PATIENCE, _HALF = 20, 0.1, 5, 0.5
# Steps are timed until so many are known, or this share of the time is gone.
_TIMED, _TIMED_SHARE = 8, 0.05
_SAVE_EVERY = 30.0


@dataclass(frozen=True)
class Lesson:
    """What a student learns from.

    Args:
        loss: runs the student, or what wraps it, on a batch: the student, images ``(N, ...)``,
            labels or None, a generator for all that is random; a scalar.
        score: of a student on images held out, lower is better.
        loader: batches of images, or of images and labels.
        labelled: whether the second part of a batch are labels to learn from.
        teacher: to be where the student is.
        frozen: whether batch norm keeps its statistics.
    """

    loss: Callable[[nn.Module, Tensor, Tensor | None, torch.Generator], Tensor]
    score: Callable[[nn.Module], float]
    loader: DataLoader[Any]
    labelled: bool
    teacher: nn.Module
    frozen: bool


@dataclass(frozen=True)
class Learned:
    """How a stage went.

    Args:
        steps, planned: done, and meant to be done in the time.
        best: the step whose weights were kept; 0: those of the beginning.
        before, after: score at the beginning, and of the weights kept.
        stopped: why it ended early, or None.
    """

    steps: int
    planned: int
    best: int
    before: float
    after: float
    stopped: str | None


def accelerator(seed: int) -> Accelerator:
    """The processes of this run, and the precision in which they learn."""
    bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return Accelerator(
        mixed_precision="bf16" if bfloat16 else "no",
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def learn(
    name: str,
    student: nn.Module,
    lesson: Lesson,
    *,
    seconds: float,
    learning_rate: float | None,
    sync_batch_norm: bool,
    seed: int,
    store: Store,
) -> Learned:
    """Train a student for a given time; it is left with the best weights that were seen.

    AdamW; the learning rate rises linearly and falls as a cosine (Loshchilov and Hutter 2017,
    https://arxiv.org/abs/1608.03983); what is scored is a moving average of the weights. The time
    is turned into a number of steps first, so that the same run gives the same weights wherever it
    is interrupted.

    Args:
        name: of the stage.
        student: in place; left in evaluation mode, on its device.
        lesson: what it learns from.
        seconds: of wall time.
        learning_rate: at its peak, or None.
        sync_batch_norm: whether batch norm takes its statistics over all processes.
        seed: of all that is random.
        store: keeps how far it has come.

    Raises:
        ArgumentError: ``sync_batch_norm`` with several processes without GPUs.
    """
    spread = accelerator(seed)
    together = sync_batch_norm and spread.num_processes > 1
    if together and spread.device.type == "cpu":
        raise ArgumentError("sync_batch_norm=True: PyTorch has it on GPUs only")
    home = next(student.parameters()).device
    trained = {parameter: parameter.requires_grad for parameter in student.parameters()}
    student.to(spread.device).requires_grad_(True)
    lesson.teacher.to(spread.device)
    norms = {
        module_name: module
        for module_name, module in student.named_modules()
        if together and isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    if together:
        nn.SyncBatchNorm.convert_sync_batchnorm(student)
    run = _Run(name, student, lesson, spread, learning_rate, seed, store)
    try:
        learned = run.go(seconds)
    finally:
        for module_name, module in norms.items():
            synchronized = student.get_submodule(module_name)
            module.load_state_dict(synchronized.state_dict())
            student.set_submodule(module_name, module)
        student.zero_grad(set_to_none=True)
        student.eval().to(home)
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
    return learned


@dataclass
class _State:
    """How far a stage is: see :class:`Learned`; and since when its scores are no lower."""

    before: float
    after: float
    step: int = 0
    best: int = 0
    lowest: float = math.inf
    waited: int = 0

    def better(self, score: float, planned: int) -> bool:
        """Take note of the score of this step; whether it is the best, the beginning included."""
        # Not against the beginning: at the full learning rate the scores may be above it.
        waits = score >= self.lowest and self.step > _HALF * planned
        self.waited = self.waited + 1 if waits else 0
        self.lowest = min(score, self.lowest)
        if score >= self.after:
            return False
        self.best, self.after = self.step, score
        return True


class _Run:
    def __init__(
        self,
        name: str,
        student: nn.Module,
        lesson: Lesson,
        spread: Accelerator,
        learning_rate: float | None,
        seed: int,
        store: Store,
    ) -> None:
        self.name, self.student, self.lesson, self.spread = name, student, lesson, spread
        self.peak = _LEAST_RATE if learning_rate is None else learning_rate
        self.chosen, self.seed, self.store = learning_rate is not None, seed, store
        self.optimizer = torch.optim.AdamW(
            student.parameters(), lr=self.peak, weight_decay=_WEIGHT_DECAY
        )
        self.wrapped, self.prepared, self.loader = spread.prepare(
            student, self.optimizer, lesson.loader
        )
        self.saved = time.perf_counter()

    def go(self, seconds: float) -> Learned:
        planned, checks = self._planned(seconds)
        decay = 1 - 1 / max(_MEMORY * planned, 2)
        average = AveragedModel(
            self.student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )
        best = _weights(self.student)
        state = self._resumed(average, best)
        if state is None:
            first = self._score(self.student)
            state = _State(before=first, after=first)
        if not self.chosen:
            images = self.lesson.loader.batch_size or _FULL
            needed = _RATE * min(state.before, 1.0) * min(planned / _LONG, 1.0)
            self.peak = max(needed * min(images / _FULL, 1.0), _LEAST_RATE)
        check = max(planned // checks, 1)
        stopped = None
        for batch in self._batches(state.step, planned):
            loss = self._step(batch, state.step, planned)
            if not math.isfinite(loss):
                stopped = f"the loss is {loss} at step {state.step + 1} of {planned}"
                break
            state.step += 1
            average.update_parameters(self.student)
            events.tell("progress", step=self.name, done=state.step, total=planned)
            if state.step % check == 0 or state.step == planned:
                score = self._score(average.module)
                rate = self._rate(state.step - 1, planned)
                events.tell(
                    "scalars", step=self.name, at=state.step, loss=loss, score=score, rate=rate
                )
                if state.better(score, planned):
                    best = _weights(average.module)
                if state.waited >= _PATIENCE:
                    stopped = f"no lower loss in {_PATIENCE} checks, at step {state.step}"
                    break
            self._save(state, best, average)
        if stopped is not None:
            log.warning("%s ends early, with the weights of step %d: %s",
                        self.name, state.best, stopped)  # fmt: skip
        self.student.load_state_dict(best)
        return Learned(state.step, planned, state.best, state.before, state.after, stopped)

    def _planned(self, seconds: float) -> tuple[int, int]:
        """How many steps and scores there is time for, by a trial or as known from before."""
        known = ranks.on_first(lambda: self.store.read(f"{self.name} steps"))
        if known is not None:
            return known[0], known[1]
        kept = _weights(self.student)
        average = AveragedModel(self.student, use_buffers=True)
        samples: list[float] = []
        start = time.perf_counter()
        began = start
        for batch in self._batches(0, _TIMED):
            self._step(batch, 0, 1)
            average.update_parameters(self.student)
            samples.append(time.perf_counter() - began)
            began += samples[-1]
            late = began - start > _TIMED_SHARE * seconds
            if len(samples) > 2 and self._agreed(late):
                break
        # The first allocates.
        each = statistics.median(samples[1:] or samples)
        began = time.perf_counter()
        self._score(self.student)
        scoring = time.perf_counter() - began
        checks = min(max(int(_CHECKS_SHARE * seconds / scoring), 1), _CHECKS)
        left = seconds - (time.perf_counter() - start) - (checks + 1) * scoring
        self.student.load_state_dict(kept)
        self.optimizer.state.clear()
        planned, checks = self._agreed((max(int(left / each), 1), checks))
        ranks.on_first(lambda: self.store.write(f"{self.name} steps", [planned, checks]))
        return planned, checks

    def _batches(self, first: int, last: int) -> Iterator[Any]:
        """Those of the steps from ``first`` to ``last``, epoch after epoch."""
        length = len(self.loader)
        step = first
        while step < last:
            epoch, done = divmod(step, length)
            self.loader.set_epoch(epoch)
            loader = self.spread.skip_first_batches(self.loader, done) if done else self.loader
            for batch in loader:
                yield batch
                step += 1
                if step == last:
                    return

    def _step(self, batch: Any, step: int, planned: int) -> float:
        images, labels = parts(batch)
        generator = torch.Generator().manual_seed((self.seed << 24) + step)
        # Of dropout, which knows no generator.
        torch.manual_seed((self.seed << 24) + step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(step, planned)
        _learning(self.student, self.lesson.frozen)
        with self.spread.autocast():
            loss = self.lesson.loss(
                self.wrapped, images, labels if self.lesson.labelled else None, generator
            )
        value = self._mean(loss)
        if math.isfinite(value):
            self.prepared.zero_grad()
            self.spread.backward(loss)
            self.spread.clip_grad_norm_(self.student.parameters(), _CLIP)
            self.prepared.step()
        return value

    def _rate(self, step: int, planned: int) -> float:
        """Learning rate of a step."""
        rising = (step + 1) / max(_WARM_UP * planned, 1)
        return self.peak * min(rising, 0.5 * (1 + math.cos(math.pi * step / planned)))

    def _score(self, net: nn.Module) -> float:
        """Of one process, for all: their averages of batch norm differ a little."""
        net.eval()
        with torch.inference_mode():
            return self._agreed(self.lesson.score(net))

    def _agreed(self, value: Any) -> Any:
        """What the first process found."""
        return ranks.on_first(lambda: value)

    def _mean(self, loss: Tensor) -> float:
        return float(self.spread.reduce(loss.detach().float(), reduction="mean"))

    def _save(self, state: _State, best: Mapping[str, Tensor], average: AveragedModel) -> None:
        if time.perf_counter() - self.saved < _SAVE_EVERY or not self.spread.is_main_process:
            return
        tensors = {f"student.{key}": value for key, value in self.student.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in average.state_dict().items()}
        tensors |= {f"best.{key}": value for key, value in best.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in slots.items()}
        tensors["state"] = torch.tensor(astuple(state), dtype=torch.float64)
        self.store.write_tensors(self.name, tensors)
        self.saved = time.perf_counter()

    def _resumed(self, average: AveragedModel, best: dict[str, Tensor]) -> _State | None:
        """The state in which an interrupted run was last saved, everything set to it."""
        tensors = ranks.on_first(lambda: self.store.read_tensors(self.name))
        if tensors is None:
            return None

        def under(prefix: str) -> dict[str, Tensor]:
            start = f"{prefix}."
            return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}

        self.student.load_state_dict(under("student"))
        average.load_state_dict(under("average"))
        best |= under("best")
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in under("optimizer").items():
            index, _, slot = key.partition(".")
            slots.setdefault(int(index), {})[slot] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        before, after, step, best_step, lowest, waited = tensors["state"].tolist()
        log.info("%s goes on at step %d", self.name, step)
        return _State(before, after, int(step), int(best_step), lowest, int(waited))


def parts(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Images, and labels or None, of a loader's batch."""
    if isinstance(batch, list | tuple):
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def _learning(student: nn.Module, frozen: bool) -> None:
    """Batch norm, unless its statistics are frozen, and dropout as in training, all else as in
    evaluation.

    In training mode some networks return something else, or want something else.
    """
    student.eval()
    for module in student.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or (
            isinstance(module, nn.modules.batchnorm._NormBase) and not frozen
        ):
            module.train()


def _weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}
