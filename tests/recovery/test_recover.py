"""recover(): any student and its teacher, as people call it."""

import copy
from pathlib import Path

import pytest
import torch
from compare import assert_close
from networks import images, residual
from torch import nn

import groupconv
from groupconv.errors import ArgumentError, DataError
from groupconv.recovery import engine


def pair() -> tuple[nn.Module, nn.Module]:
    """A teacher, and a student that was moved away from it."""
    torch.manual_seed(0)
    teacher = residual().eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return teacher, student.train()


def apart(teacher: nn.Module, student: nn.Module) -> float:
    x = images(32, seed=9)
    with torch.inference_mode():
        return float((teacher(x) - student(x)).square().mean())


def test_a_student_comes_near_its_teacher(tmp_path: Path) -> None:
    teacher, student = pair()
    weights = copy.deepcopy(teacher.state_dict())
    before = apart(teacher, student.eval())
    options = groupconv.Recovery("2s", learning_rate=1e-2)
    state = torch.get_rng_state()
    stages = groupconv.recover(student.train(), teacher, images(64), options, out=tmp_path)
    assert apart(teacher, student) < 0.5 * before
    assert [stage["stage"] for stage in stages] == ["batch norm", "distil"]
    assert stages[-1]["after"] < stages[-1]["before"]
    assert not student.training
    assert all(torch.equal(weights[k], v) for k, v in teacher.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not (tmp_path / ".unfinished").exists()


def test_labels_are_learned_from_where_the_teacher_knows_them() -> None:
    teacher, student = pair()
    x = images(64)
    with torch.inference_mode():
        labels = teacher(x).argmax(1)

    def loss(data: object) -> float:
        stages = groupconv.recover(copy.deepcopy(student), teacher, data, "bn")
        return float(stages[0]["before"])

    assert loss((x, labels)) != pytest.approx(loss(x))
    assert loss((x, (labels + 1) % 5)) == loss(x)


def test_it_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_SAVE_EVERY", 0.0)
    teacher, whole = pair()
    interrupted, again = copy.deepcopy(whole), copy.deepcopy(whole)
    x, step = images(64), engine._Run._step
    arguments = (teacher, x, "1s")

    def fails_at_9(self: engine._Run, batch: object, number: int, planned: int) -> float:
        if number == 9:
            raise KeyboardInterrupt
        return step(self, batch, number, planned)

    monkeypatch.setattr(engine._Run, "_planned", lambda self, seconds: (20, 4))
    groupconv.recover(whole, *arguments)
    monkeypatch.setattr(engine._Run, "_step", fails_at_9)
    with pytest.raises(KeyboardInterrupt):
        groupconv.recover(interrupted, *arguments, out=tmp_path)
    monkeypatch.setattr(engine._Run, "_step", step)
    with pytest.raises(DataError, match="seed"):
        groupconv.recover(again, *arguments, out=tmp_path, seed=1)
    groupconv.recover(again, *arguments, out=tmp_path)
    assert_close(again(x), whole(x), rtol=0, atol=0)


def test_nothing_to_do_is_refused() -> None:
    teacher, student = pair()
    with pytest.raises(ArgumentError, match='recovery="none"'):
        groupconv.recover(student, teacher, images(8), "none")
    with pytest.raises(ArgumentError, match=r"'soon' must be .* or a time"):
        groupconv.recover(student, teacher, images(8), "soon")
