"""The study of a search: its trials in a journal file or a database, and Optuna, which proposes and prunes."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvmk.config.resume import differing_keys
from cvmk.config.schema import TrainConfig
from cvmk.config.search import SearchConfig
from cvmk.config.section import BY_CONTENT, OnResume
from cvmk.errors import ConfigError, DataError
from cvmk.search.sampler import pruner, sampler, suggest
from cvmk.search.space import Space

JOURNAL = "study.log"
_FREE = (
    "run.folder", "run.device", "run.threads", "data.cache", "data.test", "telemetry",
    "training.save_every", "training.keep", "training.log_every", "validation.metrics", "validation.bootstrap",
)  # fmt: skip
SEEN_SECONDS = 60.0
"""How often a search says that it is alive."""
LOST_SECONDS = 900.0
"""A trial of another machine whose search has said nothing for so long is lost, and done again."""
_UNOWNED_SECONDS = 60.0
_STARTS = 5
_GOOD = 0.25
"""The share of trials that count as good for importances: Optuna's tenth is two or three of the few that a search has."""
_URL = re.compile(r"[a-z][a-z0-9+]*://")
_BASE, _SPACE, _CORPORA = "cvmk.configuration", "cvmk.space", "cvmk.corpora"
_OWNER, _SEEN, _REASON, _STEP, _SECONDS, _AGAIN = ("cvmk." + name for name in ("owner", "seen", "reason", "iterations", "seconds", "again"))

COMPLETE, PRUNED, FAILED, RUNNING = "complete", "pruned", "failed", "running"


@dataclass(frozen=True)
class TrialRecord:
    """What the study knows of a trial."""

    number: int
    state: str
    parameters: dict[str, Any]
    """By configuration key, as the configuration is given them."""
    value: float | None
    """The score that counts: of a complete trial its last, of others the best so far."""
    scores: dict[int, float]
    """By iteration."""
    iterations: int
    seconds: float
    reason: str


class SearchStudy:
    """A study in its storage, opened for the search of `space` by `config`.

    `owner` is what tells this search from others in the same storage: its machine and folder. Raises ConfigError for a study that was made with
    another configuration or space, DataError where the storage cannot be reached, and so do all methods.
    """

    def __init__(
        self, config: SearchConfig, space: Space, base: Mapping[str, Any], folder: Path, *, lower_is_better: bool, iterations: int, every: int
    ) -> None:
        """`base` is the configuration as JSON holds it; a trial has `iterations` at most and a score after `every`."""
        self._optuna = library()
        self.name = config.name or folder.resolve().name
        self.lower_is_better, self._space = lower_is_better, space
        self._owner = f"{socket.gethostname()}:{folder.resolve()}"
        self._alone = config.storage is None
        self._place = str(folder / JOURNAL) if config.storage is None else _without_password(config.storage)
        self._trials: dict[int, Any] = {}
        with self._reached(), self._understood():
            self._study = self._optuna.create_study(
                storage=_storage(config.storage or str(folder / JOURNAL), alone=self._alone),
                sampler=sampler(config),
                pruner=pruner(config, iterations, every),
                study_name=self.name,
                direction="minimize" if lower_is_better else "maximize",
                load_if_exists=True,
            )
            self._claim(dict(base), made=any((folder / name).exists() for name in ("tokenizer", "teacher")))

    # -- whose study it is ---------------------------------------------------------------------------------------------------
    def _claim(self, base: dict[str, Any], *, made: bool) -> None:
        """Write what the study is of, or compare. `made`: something that its trials share is there.

        Where a search failed before it made anything, as for a key that only the text shows to be wrong, what it was of is written anew.
        """
        known = self._study.user_attrs
        if _BASE not in known:
            if self._study.get_trials(deepcopy=False):
                raise ConfigError(f"the study {self.name} in {self._place} is not of `cvmk search`: choose another search.name or search.storage")
            self._write_claim(base)
            return
        before, space = known[_BASE], known[_SPACE]
        differ = [f"search.space.{key}" for key in {**space, **self._space.shown()} if space.get(key) != self._space.shown().get(key)]
        differ += [key for key, mark in differing_keys(TrainConfig, before, base).items() if not _free(key, mark)]
        is_alike = self.lower_is_better == (self._study.direction == self._optuna.study.StudyDirection.MINIMIZE)
        if differ and self._alone and is_alike and not made and not self._study.get_trials(deepcopy=False):
            self._write_claim(base)
        elif differ:
            what = f"{', '.join(differ[:5])} {'differs' if len(differ) == 1 else 'differ'}"
            raise ConfigError(
                f"the study {self.name} in {self._place} was made with another configuration ({what}): "
                "its trials cannot be compared with new ones, so go back to that configuration, or choose another search.folder (or search.name)"
            )

    def _write_claim(self, base: dict[str, Any]) -> None:
        self._study.set_user_attr(_SPACE, self._space.shown())
        self._study.set_user_attr(_BASE, base)

    def check_corpora(self, fingerprints: Mapping[str, str]) -> None:
        """Raises ConfigError where the study's trials were trained or scored on other text."""
        with self._reached():
            before = self._study.user_attrs.get(_CORPORA)
            if before is None:
                self._study.set_user_attr(_CORPORA, dict(fingerprints))
        differ = sorted(name for name in before or () if before[name] != fingerprints.get(name))
        if differ:
            raise ConfigError(
                f"the study {self.name} in {self._place} was made on other text (the content of {', '.join(differ)} has changed): "
                "bring that back, or choose another search.folder (or search.name)"
            )

    # -- trials --------------------------------------------------------------------------------------------------------------
    def adopt(self) -> list[TrialRecord]:
        """The trials that an earlier run of this search has left unfinished: they are ours to go on with.

        Trials of other machines that have long been silent are given up, and their parameters proposed again.
        """
        with self._reached():
            mine = []
            for trial in self._study.get_trials(deepcopy=False, states=(self._optuna.trial.TrialState.RUNNING,)):
                owner = trial.user_attrs.get(_OWNER)
                if owner is None and (self._alone or time.time() - trial.datetime_start.timestamp() > _UNOWNED_SECONDS):
                    owner = self._owner  # whoever asked for it was killed before a word
                if owner == self._owner and trial.number not in self._trials:
                    mine.append(self._own(self._optuna.trial.Trial(self._study, trial._trial_id)))
                elif owner != self._owner and time.time() - trial.user_attrs.get(_SEEN, time.time()) > LOST_SECONDS:
                    self._give_up(trial)
            return mine

    def ask(self, limit: int) -> TrialRecord | None:
        """A new trial, ours; None where the study has `limit` trials (0 = no limit)."""
        with self._reached():
            if limit and self._counted() >= limit:
                return None
            trial = self._study.ask()
            if limit and self._counted(trial.number) >= limit:  # another machine was quicker
                self._drop(trial, "the budget of trials was used up by another machine")
                return None
            return self._own(trial)

    def report(self, number: int, step: int, value: float) -> bool:
        """Note a trial's score at an iteration; whether the trial should end early."""
        with self._reached():
            trial, known = self._trials[number], self._frozen(number)
            if known.state.is_finished():  # we were taken for lost
                return True
            if step not in known.intermediate_values:  # as where a resumed run validates once more
                trial.report(value, step)
            return bool(trial.should_prune())

    def finish(self, number: int, state: str, *, value: float | None = None, reason: str = "", iterations: int = 0, seconds: float = 0.0) -> None:
        """End a trial."""
        states = self._optuna.trial.TrialState
        with self._reached():
            lost = self._frozen(number).state.is_finished()  # we were taken for lost, and another machine does it again
            trial = self._trials.pop(number)
            if lost:
                return
            for name, attribute in ((_REASON, reason), (_STEP, iterations), (_SECONDS, round(seconds, 3))):
                trial.set_user_attr(name, attribute)
            found = {COMPLETE: states.COMPLETE, PRUNED: states.PRUNED, FAILED: states.FAIL}[state]
            self._study.tell(trial, value if state == COMPLETE else None, state=found)

    def alive(self) -> None:
        """Say that our trials are still running."""
        with self._reached():
            for trial in self._trials.values():
                with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
                    trial.set_user_attr(_SEEN, time.time())

    def records(self) -> list[TrialRecord]:
        """All trials that count, by number."""
        with self._reached():
            return [self._record(trial) for trial in self._study.get_trials(deepcopy=False) if self._counts(trial)]

    def best(self) -> TrialRecord | None:
        """The best of the complete trials; of equals the first."""
        complete = [(one.value, one) for one in self.records() if one.state == COMPLETE and one.value is not None]
        sign = 1 if self.lower_is_better else -1
        return min(complete, key=lambda pair: (sign * pair[0], pair[1].number), default=(None, None))[1]

    def importances(self) -> dict[str, float]:
        """By key, its share of what sets the best quarter of the trials apart (PED-ANOVA, Watanabe et al. 2023), largest first; empty with too few trials.

        A pruned trial counts with its best score until then: it fell behind for some reason, and without it only good trials were compared.
        """
        states = self._optuna.trial.TrialState
        with self._reached(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = {trial.number: trial for trial in self._study.get_trials(deepcopy=False)}
            counted = [(one.value, known[one.number]) for one in self.records() if one.state in (COMPLETE, PRUNED) and one.value is not None]
            if len({value for value, _ in counted}) < 2:
                return {}
            study = self._optuna.create_study(direction="minimize" if self.lower_is_better else "maximize")
            for value, trial in counted:
                study.add_trial(self._optuna.trial.create_trial(state=states.COMPLETE, value=value, params=trial.params, distributions=trial.distributions))
            evaluator = self._optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_GOOD)
            return dict(self._optuna.importance.get_param_importances(study, evaluator=evaluator))

    # -- within --------------------------------------------------------------------------------------------------------------
    def _own(self, trial: Any) -> TrialRecord:
        trial.set_user_attr(_OWNER, self._owner)
        trial.set_user_attr(_SEEN, time.time())
        for one in self._space.keys.values():
            suggest(trial, one)
        self._trials[trial.number] = trial
        return self._record(self._frozen(trial.number))

    def _drop(self, trial: Any, reason: str) -> None:
        trial.set_user_attr(_AGAIN, True)
        trial.set_user_attr(_REASON, reason)
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def _give_up(self, frozen: Any) -> None:
        with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):  # another was quicker
            trial = self._optuna.trial.Trial(self._study, frozen._trial_id)
            self._drop(trial, f"the search {frozen.user_attrs.get(_OWNER)} has gone away; it is done again")
            self._study.enqueue_trial(frozen.params)

    def _frozen(self, number: int) -> Any:
        return next(trial for trial in self._study.get_trials(deepcopy=False) if trial.number == number)

    def _counted(self, below: int | None = None) -> int:
        return sum(self._counts(trial) for trial in self._study.get_trials(deepcopy=False) if below is None or trial.number < below)

    def _counts(self, trial: Any) -> bool:
        return trial.state != self._optuna.trial.TrialState.WAITING and not trial.user_attrs.get(_AGAIN, False)

    def _record(self, trial: Any) -> TrialRecord:
        states = self._optuna.trial.TrialState
        state = {states.COMPLETE: COMPLETE, states.PRUNED: PRUNED, states.FAIL: FAILED}.get(trial.state, RUNNING)
        scores = dict(sorted(trial.intermediate_values.items()))
        value = trial.value if state == COMPLETE else (min if self.lower_is_better else max)(scores.values(), default=None)
        attributes = trial.user_attrs
        parameters = {key: self._space.keys[key].value(value) for key, value in trial.params.items() if key in self._space.keys}
        iterations = attributes.get(_STEP, max(scores, default=0))
        return TrialRecord(trial.number, state, parameters, value, scores, iterations, attributes.get(_SECONDS, 0.0), attributes.get(_REASON, ""))

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (self._optuna.exceptions.StorageInternalError, SQLAlchemyError, OSError) as error:
            why = _reason(error)
            raise DataError(f"the study {self.name} in {self._place} cannot be reached ({why}): see to that, then the same command goes on") from error

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, RuntimeError, AssertionError) as error:
            what = f"the study {self.name} in {self._place} is damaged or of another Optuna ({_reason(error)})"
            raise DataError(f"{what}: restore it, or choose another search.folder (or search.storage)") from error


def library() -> Any:
    """Optuna. Raises ConfigError, with the remedy, where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("`cvmk search` needs Optuna, which is not installed: pip install 'cvmk[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _storage(place: str, *, alone: bool) -> Any:
    """Of a file's name or a database's URL. `alone`: nobody else has the file open."""
    import optuna

    if _URL.match(place):
        return _database(place)
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    lock = JournalFileOpenLock(place)
    if alone:  # left by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            os.unlink(place + ".lock")
    _mend(place, lock)
    return optuna.storages.JournalStorage(JournalFileBackend(place, lock))


def _database(url: str) -> Any:
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, IntegrityError, ProgrammingError

    for left in reversed(range(_STARTS)):
        try:
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})  # a connection may be lost between two trials
        except (IntegrityError, ProgrammingError):  # searches that start at once make the tables at once
            if not left:
                raise
            time.sleep(random.uniform(0.1, 0.5))
        except ImportError as error:
            raise ConfigError(
                f"search.storage = {_without_password(url)} needs a driver that is not installed ({error}): "
                "pip install 'cvmk[postgresql]' for PostgreSQL, another database's own driver, or name a file"
            ) from error
        except (ArgumentError, ValueError) as error:
            raise ConfigError(
                f"search.storage = {_without_password(url)} is no URL of a database ({_reason(error)}): write it as postgresql+psycopg://user@host/base"
            ) from error
    raise AssertionError


def _mend(path: str, lock: Any) -> None:
    """Take away half a line at the end, which a process that was killed has left, or a disk that was full: the next line must not join it."""
    if not os.path.exists(path):
        return
    lock.acquire()
    try:
        with open(path, "r+b") as file:
            data = file.read()
            if data and not data.endswith(b"\n"):
                file.truncate(data.rfind(b"\n") + 1)
    finally:
        lock.release()


def _without_password(place: str) -> str:
    return re.sub(r"(://[^/@:]*):[^@]*@", r"\1:***@", place)


def _free(key: str, mark: OnResume | None) -> bool:
    """Whether trials can be compared though the key differs: it changes neither training nor the score, or says where the text is."""
    return key.startswith(_FREE) or mark is BY_CONTENT and key.startswith("data.")


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _without_password(lines[0]) if lines else type(error).__name__
