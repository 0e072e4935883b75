"""Budgets shared by several processes: each done once, those of a lost process again."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from networks import images, residual

import groupconv
from groupconv.errors import ArgumentError, BudgetError
from groupconv.optimize import study as study_module
from groupconv.optimize.study import Study

BUDGETS = ["90%macs", "70%macs", "50%macs"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "_LOOK", 0.05)


def test_each_budget_is_done_once(tmp_path: Path) -> None:
    done: list[tuple[int, str]] = []

    def worker(number: int) -> None:
        def run(budget: str) -> float:
            both.wait(timeout=30)
            done.append((number, budget))
            return 1.0

        Study(tmp_path, BUDGETS[:2]).work(run)

    # Neither can do its first before the other has taken one.
    both = threading.Barrier(2)
    workers = [threading.Thread(target=worker, args=(number,)) for number in range(2)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join(timeout=60)
    assert sorted(budget for _, budget in done) == sorted(BUDGETS[:2])
    assert {number for number, _ in done} == {0, 1}
    again = Study(tmp_path, BUDGETS[:2])
    again.work(lambda budget: pytest.fail(f"{budget} is done again"))


def test_what_is_lost_is_taken_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A worker killed in the midst of its second budget."""
    code = f"""
import os, signal
from pathlib import Path
from groupconv.optimize.study import Study
done = []
def run(budget):
    if done:
        print(budget, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(budget)
    return 1.0
Study(Path({str(tmp_path)!r}), {BUDGETS!r}).work(run)
"""
    killed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGKILL
    lost = killed.stdout.strip()
    done: list[str] = []

    def run(budget: str) -> float:
        done.append(budget)
        return 1.0

    Study(tmp_path, BUDGETS).work(run)
    assert len(done) == len(BUDGETS) - 1
    assert lost in done
    assert f"{lost} was lost" in caplog.text


def test_a_budget_that_can_not_be_met(tmp_path: Path) -> None:
    """The others are done all the same; then all processes say so."""
    done: list[str] = []

    def run(budget: str) -> float:
        if budget == BUDGETS[0]:
            raise BudgetError(f"{budget} can't be met")
        done.append(budget)
        return 1.0

    for _ in range(2):
        with pytest.raises(BudgetError, match=r"^90%macs can't be met$"):
            Study(tmp_path, BUDGETS).work(run)
    assert done == BUDGETS[1:]


def test_other_budgets_and_a_missing_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Study(tmp_path, BUDGETS)
    with pytest.raises(ArgumentError, match="others share"):
        Study(tmp_path, BUDGETS[:1])
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ArgumentError, match=r"pip install 'groupconv\[train\]'"):
        Study(tmp_path, BUDGETS)


@pytest.mark.usefixtures("steady_clock")
def test_a_joined_sweep_gives_what_a_sweep_gives(tmp_path: Path) -> None:
    model, x = residual(), images()
    apart = groupconv.sweep(model, x, budgets=BUDGETS, out=tmp_path / "apart")
    joined = groupconv.sweep(model, x, budgets=BUDGETS, out=tmp_path / "joined", join=True)
    for one, two in zip(apart, joined, strict=True):
        assert one.plan.layers == two.plan.layers
        assert two.report["settings"]["budget"] == one.report["settings"]["budget"]
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(two.model.state_dict()[name], value)
    assert {"frontier.html", "frontier.json"} < {p.name for p in (tmp_path / "joined").iterdir()}
    for changes in ({"out": None}, {"restart": True}):
        arguments = {"out": tmp_path / "joined"} | changes
        with pytest.raises(ArgumentError, match="join=True"):
            groupconv.sweep(model, x, budgets=BUDGETS, join=True, **arguments)
