"""A student drawn to its teacher: what is learned, what is kept, and where it goes on."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_close
from networks import images, residual
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from groupconv import events
from groupconv.data import Images
from groupconv.errors import ArgumentError
from groupconv.recovery import Recovery, engine
from groupconv.recovery.stages import School, reestimate_batch_norm
from groupconv.store import Store


class Autoencoder(nn.Module):
    """Its outputs are images, not classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.conv(x), "aside"


class Detector(nn.Module):
    """As many boxes as it finds; in training mode it would want their true places."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor, targets: Any = None) -> list[dict[str, Tensor]]:
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        return [{"boxes": y[y > y.mean()]} for y in self.body(x)]


def moved_away(teacher: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return student


def school(
    teacher: nn.Module, recovery: Recovery, store: Store | None = None, **changes: Any
) -> School:
    arguments = {"features": (), "images": Images(images(64), None, "noise"), "batch": 16}
    arguments |= changes
    return School.of(
        teacher,
        arguments["features"],
        arguments["images"],
        Images(images(24, seed=7), None, "more noise"),
        recovery,
        batch=arguments["batch"],
        seed=3,
        store=store or Store(None, ""),
    )


@pytest.mark.parametrize("build", [residual, Autoencoder])
def test_student_comes_near_its_teacher(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    teacher = build().eval()
    before = copy.deepcopy(teacher.state_dict())
    student = moved_away(teacher)
    student.requires_grad_(False)
    taught = school(teacher, Recovery("2s", learning_rate=1e-2))
    far = taught.score(student)
    stages = taught.teach(student)
    learned = stages[-1]
    assert learned["stage"] == "distil"
    assert taught.score(student) < 0.7 * far
    assert learned["after"] == pytest.approx(taught.score(student), rel=1e-4)
    assert 0 < learned["best"] <= learned["steps"] <= learned["planned"]
    assert not any(p.requires_grad or p.grad is not None for p in student.parameters())
    assert not any(m.training for net in (student, teacher) for m in net.modules())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} of the teacher was changed"


def test_what_is_worse_is_not_kept() -> None:
    """A student that is as good as its teacher can only lose."""
    teacher = residual()
    student = copy.deepcopy(teacher)
    stages = school(teacher, Recovery("1s", learning_rate=0.1)).teach(student)
    assert [stage["stage"] for stage in stages] == ["batch norm", "distil"]
    assert not stages[0]["kept"]
    assert stages[1]["best"] == 0
    for name, value in student.state_dict().items():
        assert torch.equal(value, teacher.state_dict()[name]), name


def test_other_outputs_teach_by_features() -> None:
    """Nothing in the boxes can be compared one to one; the features before them can."""
    from groupconv.recovery import Feature

    torch.manual_seed(0)
    teacher = Detector().eval()
    student = moved_away(teacher)
    taught = school(
        teacher, Recovery("2s", learning_rate=1e-2),
        features=[Feature("body.1", "body.1", tuple(range(8)))],
    )  # fmt: skip
    far = taught.score(student)
    stages = taught.teach(student)
    assert [stage["stage"] for stage in stages] == ["batch norm", "blocks", "distil"]
    assert taught.score(student) < 0.7 * far
    with pytest.raises(ArgumentError, match="give a loss"):
        school(teacher, Recovery("1s")).teach(student)


def test_loss_of_the_user() -> None:
    """It alone counts, and takes the labels as the loader has them."""
    teacher, seen = residual(), []

    def loss(mine: Tensor, other: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(labels)
        return (mine - 7).square().mean()

    student = moved_away(teacher)
    data = Images(images(64), torch.arange(64) % 4, "noise")
    taught = school(teacher, Recovery("2s", loss=loss, learning_rate=3e-2), images=data)
    far = taught.score(student)
    taught.teach(student)
    assert taught.score(student) < 0.7 * far
    assert any(labels is not None for labels in seen)


def test_labels_that_the_teacher_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    """Those of some of the classes, counted from zero, would mislead."""
    torch.manual_seed(0)
    teacher, x = residual(), images(64)
    with torch.no_grad():
        known = teacher(x).argmax(1)
    right = school(teacher, Recovery("1s"), images=Images(x, known, "x"))
    assert right.labelled
    classes = right.classes
    assert not caplog.messages
    wrong = school(teacher, Recovery("1s"), images=Images(x, (known + 1) % classes, "x"))
    assert not wrong.labelled
    assert "labels are not learned from" in caplog.text
    outside = school(teacher, Recovery("1s"), images=Images(x, known + classes, "x"))
    assert not outside.labelled
    assert not school(teacher, Recovery("1s")).labelled


def test_batch_norm_takes_the_statistics_of_the_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, momentum=0.3)).eval()
    x = 5 + 2 * images(32)
    reestimate_batch_norm(model, x.split(16))
    with torch.no_grad():
        y = model[0](x)
    halves = torch.stack([half.var((0, 2, 3)) for half in y.split(16)])
    assert_close(model[1].running_mean, y.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert_close(model[1].running_var, halves.mean(0), rtol=1e-4, atol=1e-4)
    assert model[1].momentum == 0.3
    assert not any(m.training for m in model.modules())


def test_batch_norm_is_kept_where_it_helps() -> None:
    teacher = residual()
    student = copy.deepcopy(teacher)
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(3.0)
    (stage,) = school(teacher, Recovery("bn")).teach(student)
    assert stage["kept"]
    assert stage["after"] < stage["before"]


@pytest.mark.parametrize(("kept", "lost", "frozen"), [
    (False, 0.1, True), (True, 0.1, False), (False, 2.0, False),
])  # fmt: skip
def test_statistics_are_frozen_where_new_ones_are_worse_and_little_was_lost(
    kept: bool, lost: float, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights before and after them learn."""
    stage = {"stage": "batch norm", "before": lost, "kept": kept}
    monkeypatch.setattr(School, "_reestimate", lambda *_: stage)
    teacher = residual()
    student = moved_away(teacher)
    _, learned = school(teacher, Recovery("2s", learning_rate=1e-2)).teach(student)
    assert learned["after"] < 0.7 * learned["before"]
    assert torch.equal(student.bn2.running_mean, teacher.bn2.running_mean) == frozen
    assert not torch.equal(student.bn2.weight, moved_away(teacher).bn2.weight)


@pytest.mark.parametrize("count", [48, 50])
def test_classes_of_few_images_are_not_compared(count: int) -> None:
    """With ten images for each of the five classes they are, and not only the features."""
    from groupconv.recovery import Feature

    teacher = residual()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.fc.bias.add_(torch.arange(5.0))
    features = [Feature("relu", "relu", tuple(range(16)))]
    data = Images(images(count), torch.zeros(count, dtype=torch.int64), "noise")
    taught = school(teacher, Recovery("1s"), features=features, images=data, batch=2)
    assert taught.few == (count < 50)
    assert (taught.score(student) == 0) == (count < 50)
    # Where there is nothing else, the outputs are what there is.
    assert school(teacher, Recovery("1s"), images=data).score(student) > 0
    same = Recovery("1s", loss=lambda mine, other, labels: (mine - other).square().mean())
    assert school(teacher, same, features=features, images=data).score(student) > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number(value: float, caplog: pytest.LogCaptureFixture) -> None:
    """The step is named, and the best weights before it are kept."""
    teacher, calls = residual(), []

    def loss(mine: Tensor, other: Tensor, _: Tensor | None) -> Tensor:
        calls.append(torch.is_grad_enabled())
        distance = (mine - other).square().mean()
        late = sum(calls) > engine._TIMED + 40
        return distance * value if calls[-1] and late else distance

    student = moved_away(teacher)
    taught = school(teacher, Recovery("3s", loss=loss, learning_rate=1e-2))
    far = taught.score(student)
    learned = taught.teach(student)[-1]
    assert f"the loss is {value} at step {learned['steps'] + 1} of" in learned["stopped"]
    assert learned["stopped"] in caplog.text
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert taught.score(student) < far


class Killed(BaseException):
    """As a signal is: no error that anything may handle."""


@pytest.mark.parametrize("features", [False, True])
def test_goes_on_where_it_was_killed(
    features: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same steps as planned, and bit for bit the same weights."""
    from groupconv.recovery import Feature

    monkeypatch.setattr(engine, "_SAVE_EVERY", 0.0)
    teacher = residual()
    student = moved_away(teacher)
    # The time would plan another number of steps each time.
    monkeypatch.setattr(engine._Run, "_planned", lambda self, seconds: (23, 20))
    first = next(n for n, m in teacher.named_modules() if isinstance(m, nn.BatchNorm2d))
    channels = tuple(range(teacher.get_submodule(first).num_features))
    taps = {"features": [Feature(first, first, channels)] if features else ()}
    recovery = Recovery("5s", learning_rate=1e-2)
    whole = copy.deepcopy(student)
    expected = school(teacher, recovery, **taps).teach(whole)
    steps: list[int] = []

    def kill(kind: str, values: dict[str, Any]) -> None:
        if kind == "progress":
            steps.append(values["done"])
            if len(steps) in (3, 4, 15, 30):
                raise Killed

    killed = 0
    while killed < 10:
        again = copy.deepcopy(student)
        with events.listening(kill):
            try:
                found = school(teacher, recovery, Store(tmp_path, "x"), **taps).teach(again)
                break
            except Killed:
                killed += 1
    assert 2 < killed < 10
    for name, value in again.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    for mine, other in zip(found, expected, strict=True):
        assert {**mine, "seconds": 0} == {**other, "seconds": 0}


def test_loaders() -> None:
    """A user's loader is used as it is; one without a length is refused."""
    teacher = residual()
    x = images(32)
    loader = DataLoader(TensorDataset(x, torch.zeros(32).long()), batch_size=8, shuffle=True)
    taught = school(teacher, Recovery("1s", train=loader))
    assert taught.loader is loader
    student = moved_away(teacher)
    assert taught.teach(student)[-1]["steps"] > 0

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            yield from x

    with pytest.raises(ArgumentError, match="train=DataLoader of an IterableDataset"):
        school(teacher, Recovery("1s", train=DataLoader(Stream(), batch_size=4)))


def test_broken_image_is_named_and_nothing_lost() -> None:
    """An error of the user's loader is heard as it is; the student is left in one piece."""

    class Broken(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            if index == 13:
                raise OSError("photos/13.jpg: truncated")
            return super().__getitem__(index)

    teacher = residual()
    student = moved_away(teacher)
    loader = DataLoader(Broken(images(32)), batch_size=8)
    with pytest.raises(OSError, match=r"photos/13\.jpg"):
        school(teacher, Recovery("1s", train=loader)).teach(student)
    assert not any(m.training for m in student.modules())
    assert all(p.grad is None for p in student.parameters())


class Viewing(nn.Module):
    """Its forward pass takes channels only in the usual order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(400, 5)
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            self.seen.append(x.is_contiguous(memory_format=torch.channels_last))
        y: Tensor = self.fc(self.conv(x).view(len(x), -1))
        return y


def test_channels_are_last_in_memory_where_the_networks_take_it() -> None:
    seen: list[bool] = []
    teacher = residual()
    student = moved_away(teacher)
    student.register_forward_pre_hook(
        lambda _, args: (
            seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
            if torch.is_grad_enabled()
            else None
        )
    )
    school(teacher, Recovery("1s")).teach(student)
    assert seen
    assert all(seen)
    viewing = Viewing().eval()
    other = moved_away(viewing)
    taught = school(viewing, Recovery("1s", learning_rate=1e-2)).teach(other)
    assert other.seen
    assert not any(other.seen)
    assert taught[-1]["after"] < taught[-1]["before"]
