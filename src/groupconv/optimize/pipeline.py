"""optimize(): the steps of the scheme in their order."""

import fnmatch
import hashlib
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groupconv.data import Images, load_images
from groupconv.errors import ArgumentError, DataError
from groupconv.files import output_folder
from groupconv.optimize.bake import bake
from groupconv.optimize.budget import Budget, parse_budget
from groupconv.optimize.capture import evaluation_mode
from groupconv.optimize.choose import choose
from groupconv.optimize.cost import count_macs
from groupconv.optimize.covariance import Moments
from groupconv.optimize.evaluate import Quality, compare, run
from groupconv.optimize.fold import fold_permutations
from groupconv.optimize.latency import layer_times
from groupconv.optimize.moments import layer_moments
from groupconv.optimize.plan import Plan, save_weights
from groupconv.optimize.recover import distil, parse_recover, reestimate_batch_norm
from groupconv.optimize.refit import refit
from groupconv.optimize.structure import Menu, freedom, menu
from groupconv.optimize.summary import summarize, write_report
from groupconv.optimize.trace import Trace, TracedConv, trace
from groupconv.targets import LatencyTable, Target, get_target
from groupconv.timing import Timing, interleave

log = logging.getLogger(__name__)

_MOMENT_IMAGES = 2_048
_MAX_POSITIONS = 20_000
_BATCH = 128
_CHECK_IMAGES = 512


@dataclass(frozen=True)
class Result:
    """What :func:`optimize` returns.

    Args:
        model: the converted network, in evaluation mode.
        plan: which layers were cut, and why.
        report: accuracy, latency (seconds), MACs and parameters before and after, and the same
            per layer; plain numbers and text, as in ``report.json``.
    """

    model: nn.Module
    plan: Plan
    report: dict[str, Any]


def optimize(
    model: nn.Module,
    data: Any,
    *,
    budget: str = "2x",
    target: str = "eager",
    recover: str = "none",
    keep: Sequence[str] = (),
    out: str | Path | None = None,
    seed: int = 0,
    test: Any = None,
    batch_size: int = 1,
    max_images: int = 1_024,
    image_size: int = 224,
) -> Result:
    """Turn a trained CNN into a network of grouped convolutions under a budget.

    The model itself is left as it was. Labels are used only to report accuracy.

    Args:
        model: a network of one image batch; evaluated in evaluation mode.
        data: calibration images: a tensor ``(N, C, H, W)``, a DataLoader, a folder, an ``.npz``.
        budget: a bound on the whole network: "2x" faster, "50%" of the latency, "12ms",
            "50%macs", "300Mmacs", "50%params", "1.2Mparams".
        target: the runtime whose measured time counts; "eager".
        recover: "none"; "bn" re-estimates batch norm; a time such as "10min" also distils from
            the original network for so long.
        keep: names or patterns (``"layer4.*"``) of layers to leave as they are.
        out: folder for model.safetensors, plan.json, report.json and report.html.
        seed: of every random choice.
        test: images to report on, in any form that data takes; by default a fifth of data is
            held out.
        batch_size: images per call when latency is measured.
        max_images: calibration images to use at most.
        image_size: height and width of the images of a folder, in pixels.

    Returns:
        Result

    Raises:
        ArgumentError: an argument breaks a rule.
        DataError: images, weights or the output folder can't be used.
        BudgetError: no choice meets the budget; nothing is written.
    """
    limit, seconds, runtime = parse_budget(budget), parse_recover(recover), get_target(target)
    for name, value in (("batch_size", batch_size), ("max_images", max_images)):
        if value < 1:
            raise ArgumentError(f"optimize: {name}={value!r} must be a positive integer")
    folder = None if out is None else output_folder(out)
    _check_weights(model)
    images = load_images(data, limit=max_images, image_size=image_size, seed=seed)
    if test is None:
        held_out, images = images.shuffled(seed).split(max(1, len(images) // 5))
    else:
        held_out = load_images(test, limit=1_000_000, image_size=image_size, seed=seed)
    if len(images) < 2:
        raise DataError(
            f"{images.source}: {len(images)} images are left to calibrate on; give more"
        )
    with evaluation_mode(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        job = _Job(model, images, runtime, limit, seed, batch_size, folder)
        return job.run(keep, held_out, recover, seconds)


class _Job:
    """One run of :func:`optimize`, after its arguments were checked."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        target: Target,
        budget: Budget,
        seed: int,
        batch_size: int,
        folder: Path | None,
    ) -> None:
        self.model, self.images, self.target = model, images, target
        self.budget, self.seed, self.batch_size, self.folder = budget, seed, batch_size, folder
        self.device = next(model.parameters()).device
        self.table = LatencyTable(None if folder is None else folder / "latency.json")
        self.steps: dict[str, float] = {}

    def run(
        self, keep: Sequence[str], held_out: Images, recover: str, seconds: float | None
    ) -> Result:
        with self._step("trace"):
            run(self.model, self._example(1))
            self.model, baked = bake(self.model)
            if baked:
                log.info("norms of weights made plain: %s", ", ".join(baked))
            self.model, folded = fold_permutations(self.model, (self._example(2),))
            mapped = trace(self.model, (self._example(2),))
            convs = self._eligible(mapped, keep)
        with self._step("moments"):
            menus = self._menus(mapped, convs)
        with self._step("measure"):
            times = layer_times(menus, self.target, self.table, self.batch_size)
        if self.table.reused:
            log.info("reused %d measured times of %s", len(self.table.reused), self.table.path)
        macs = self._macs(self.model)
        with self._step("select"):
            choice = choose(
                self.model, mapped, menus, times, self.budget, self._known_latency,
                target=self.target.name, seed=self.seed, macs=macs,
            )  # fmt: skip
        net = choice.converted.model
        with self._step("refit"):
            losses = refit(
                self.model,
                choice.converted,
                self._moment_batches,
                max_positions=_MAX_POSITIONS,
                images=min(len(self.images), _MOMENT_IMAGES),
                seed=self.seed,
            )
        fitted = compare(self.model, net, held_out)
        log.info("refitted: %s", _in_words(fitted))
        if seconds is not None and choice.converted.placed:
            self._recover(net, seconds)
        with self._step("evaluate"):
            quality = compare(self.model, net, held_out)
            log.info("recovered: %s", _in_words(quality))
            latency = self._latency(net)
        report = summarize(
            model=self.model,
            converted=choice.converted,
            mapped=mapped,
            menus=menus,
            chosen=choice.chosen,
            times=choice.times,
            losses=losses,
            fitted=fitted,
            quality=quality,
            latency=latency,
            macs=(macs, self._macs(net)),
            steps=self.steps,
            reasons=choice.plan.reasons,
            settings={
                "model": type(self.model).__name__,
                "budget": self.budget.text,
                "target": self.target.name,
                "recover": recover,
                "seed": self.seed,
                "batch_size": self.batch_size,
                "input_shape": list(self.images.images.shape[1:]),
                "data": self.images.source,
                "calibration_images": len(self.images),
                "test_data": held_out.source,
            },
        )
        if self.folder is not None:
            save_weights(self.folder, net, choice.converted.edits, folded, baked)
            write_report(self.folder, choice.plan, report)
        return Result(net, choice.plan, report)

    def _eligible(self, mapped: Trace, keep: Sequence[str]) -> list[TracedConv]:
        """Dense convolutions that can be cut and that the user does not keep."""
        names = [conv.name for conv in mapped.convs]
        for pattern in keep:
            if not fnmatch.filter(names, pattern):
                raise ArgumentError(
                    f"keep={pattern!r} matches no convolution; they are {', '.join(names)}"
                )
        for name, reason in mapped.skipped.items():
            log.info("left as it is: %s (%s)", name, reason)
        convs = [
            conv
            for conv in mapped.convs
            if conv.spec.groups == 1
            and math.gcd(conv.spec.in_channels, conv.spec.out_channels) > 1
            and not any(fnmatch.fnmatchcase(conv.name, pattern) for pattern in keep)
        ]
        log.info("%d of %d convolutions can be cut into groups", len(convs), len(mapped.convs))
        return convs

    def _menus(self, mapped: Trace, convs: list[TracedConv]) -> dict[str, Menu]:
        free = freedom(mapped, convs)
        menus = {}
        for conv in convs:
            (moments,) = layer_moments(
                self.model,
                self.model,
                [(conv, conv.name)],
                self._moment_batches(),
                max_positions=_MAX_POSITIONS,
                images=min(len(self.images), _MOMENT_IMAGES),
                seed=self.seed,
            )
            log.info(
                "%s: %d positions, relative error of its %s %s",
                conv.name,
                moments.count,
                "variance" if isinstance(moments, Moments) else "separable covariance",
                "unknown" if moments.error is None else f"{moments.error:.1%}",
            )
            weight = self.model.get_submodule(conv.name).weight
            assert isinstance(weight, Tensor)
            menus[conv.name] = menu(conv, weight, moments, free[conv.name], self.seed)
        return menus

    def _recover(self, net: nn.Module, seconds: float) -> None:
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in net.modules()):
            with self._step("batch norm"):
                self._reestimate(net)
        if seconds:
            with self._step("distil"):
                count = distil(self.model, net, self._shuffled, seconds)
            log.info("distilled for %d steps", count)

    def _reestimate(self, net: nn.Module) -> None:
        """Re-estimate batch norm, and go back where that takes the output further away.

        It helps where the layers lost much; where the refit kept the statistics, it adds noise.
        """
        sample = Images(self.images.images[:_CHECK_IMAGES], None, self.images.source)
        fitted = {name: value.clone() for name, value in net.named_buffers()}
        before = compare(self.model, net, sample).output_error
        reestimate_batch_norm(net, self._batches())
        after = compare(self.model, net, sample).output_error
        log.info("batch norm re-estimated: output error %.4f, %.4f before", after, before)
        if after > before:
            log.info("batch norm: re-estimate not kept")
            for name, value in net.named_buffers():
                value.copy_(fitted[name])

    def _macs(self, net: nn.Module) -> int:
        return count_macs(net, (self._example(1),))

    def _known_latency(self, net: nn.Module, plan: str) -> tuple[Timing, Timing]:
        """As :meth:`_latency`, kept in the table: one table of times gives one plan."""
        shapes = [(name, tuple(value.shape)) for name, value in self.model.state_dict().items()]
        example = (self._example(self.batch_size),)
        network = repr((type(self.model).__name__, shapes, tuple(example[0].shape)))
        digest = hashlib.sha256(network.encode()).hexdigest()[:16]
        before, after = (
            f"{self.target.name} network {digest} plan {plan} {side}"
            for side in ("before", "after")
        )
        builds = {
            before: lambda: self.target.build(self.model, example),
            after: lambda: self.target.build(net, example),
        }
        times = self.table.measure(builds, seconds=1.5)
        return times[before], times[after]

    def _latency(self, net: nn.Module) -> tuple[Timing, Timing]:
        """The original and the converted network in one interleaved run."""
        example = (self._example(self.batch_size),)
        calls = {
            "before": self.target.build(self.model, example),
            "after": self.target.build(net, example),
        }
        timings = interleave(calls, seconds=3.0, min_runs=7, max_runs=400)
        return timings["before"], timings["after"]

    def _example(self, batch: int) -> Tensor:
        """Real images, repeated if there are too few."""
        index = torch.arange(batch) % len(self.images)
        return self.images.images[index].to(self.device)

    def _batches(self) -> Iterator[Tensor]:
        for batch in _parts(self.images.images):
            yield batch.to(self.device)

    def _moment_batches(self) -> Iterator[Tensor]:
        for batch in _parts(self.images.images[:_MOMENT_IMAGES]):
            yield batch.to(self.device)

    def _shuffled(self, epoch: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        for index in _parts(torch.randperm(len(self.images), generator=generator)):
            yield self.images.images[index].to(self.device)

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.steps[name] = time.perf_counter() - start
        log.info("%s: %.1f s", name, self.steps[name])


def _parts(items: Tensor) -> tuple[Tensor, ...]:
    """Batches of nearly equal size: a last one of a single image would break batch norm."""
    return items.tensor_split(math.ceil(len(items) / _BATCH))


def _in_words(quality: Quality) -> str:
    if quality.accuracy_after is not None and quality.accuracy_before is not None:
        return f"accuracy {quality.accuracy_after:.2%} (original {quality.accuracy_before:.2%})"
    if quality.agreement is not None:
        return f"top-1 agreement with the original {quality.agreement:.2%}"
    return f"relative output error {quality.output_error:.4f}"


def _check_weights(model: nn.Module) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if not any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        raise ArgumentError(f"model: {type(model).__name__} has no convolution")
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise DataError(f"model: {name} holds NaN or Inf")
