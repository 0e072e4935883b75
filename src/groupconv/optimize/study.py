"""Budgets that several processes share: each takes the next that is free, by an Optuna study.

The study is a file of the output folder (Akiba et al. 2019, https://arxiv.org/abs/1907.10902). A
process holds a lock on what it has taken, which ends with it: a budget that is taken and not locked
was lost with its process, and is taken again.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from groupconv.errors import ArgumentError, BudgetError

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial, TrialState

log = logging.getLogger(__name__)

_FOLDER = ".study"
_BUDGET, _WHY = "budget", "why"
# Seconds between two looks whether others have lost what they took.
_LOOK = 2.0


class Study:
    """The budgets of one output folder.

    Args:
        folder: shared by all processes.
        budgets: the same in all of them.

    Raises:
        ArgumentError: Optuna is not installed, or others work on other budgets there.
    """

    def __init__(self, folder: Path, budgets: Sequence[str]) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ArgumentError(
                "join=True: Optuna is not installed: pip install 'groupconv[train]'"
            ) from error
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.budgets, self.folder = list(budgets), folder / _FOLDER
        self.folder.mkdir(exist_ok=True)
        self._states = optuna.trial.TrialState
        self._lock = FileLock(self.folder / "lock")
        with self._lock:
            storage = JournalStorage(JournalFileBackend(str(self.folder / "journal.log")))
            self.study = optuna.create_study(
                study_name="budgets", storage=storage, load_if_exists=True
            )
            known = self.study.user_attrs.get("budgets")
            if known is None:
                self.study.set_user_attr("budgets", self.budgets)
                for budget in self.budgets:
                    self.study.enqueue_trial({_BUDGET: budget})
            elif known != self.budgets:
                raise ArgumentError(
                    f"budgets={self.budgets!r}: others share {known!r} in {str(folder)!r}; give "
                    "the same, or another folder"
                )

    def work(self, run: Callable[[str], float]) -> None:
        """Do what is free, one budget after the other, until all are done by some process.

        Args:
            run: takes a budget; what it gives is kept with the trial.

        Raises:
            BudgetError: all have ended, and some could not be met.
        """
        while (taken := self._take()) is not None:
            trial, budget, lock = taken
            try:
                self.study.tell(trial, run(budget))
            except BudgetError as error:
                trial.set_user_attr(_WHY, str(error))
                self.study.tell(trial, state=self._states.FAIL)
            finally:
                lock.release()
        failed = [t.user_attrs[_WHY] for t in self._trials(self._states.FAIL) if t.user_attrs]
        if failed:
            raise BudgetError("; ".join(failed))

    def _take(self) -> "tuple[Trial, str, FileLock] | None":
        """The next budget, locked, when there is one; None when all are done."""
        while True:
            with self._lock:
                self._free_the_lost()
                if self._trials(self._states.WAITING):
                    trial = self.study.ask()
                    budget = trial.suggest_categorical(_BUDGET, self.budgets)
                    lock = self._lock_of(budget)
                    lock.acquire()
                    return trial, budget, lock
                if not self._trials(self._states.RUNNING):
                    return None
            time.sleep(_LOOK)

    def _free_the_lost(self) -> None:
        for trial in self._trials(self._states.RUNNING):
            # Before it had its parameters, perhaps.
            budget = trial.system_attrs["fixed_params"][_BUDGET]
            try:
                with self._lock_of(budget):
                    log.warning("%s was lost with the process that had taken it", budget)
                    self.study.tell(trial.number, state=self._states.FAIL)
                    self.study.enqueue_trial({_BUDGET: budget})
            except Timeout:
                continue

    def _trials(self, state: "TrialState") -> "list[FrozenTrial]":
        return [t for t in self.study.get_trials(deepcopy=False) if t.state == state]

    def _lock_of(self, budget: str) -> FileLock:
        return FileLock(self.folder / f"{self.budgets.index(budget)}.lock", timeout=0)
