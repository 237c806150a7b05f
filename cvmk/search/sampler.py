"""Optuna's samplers and pruners as the configuration names them. Trial N's proposal depends on the seed, N and the trials before alone, so that
a search that is resumed proposes nothing twice."""

from __future__ import annotations

from typing import Any

import numpy as np

from cvmk.config.search import SearchConfig
from cvmk.search.space import Key


def suggest(trial: Any, key: Key) -> None:
    """Let the trial have a value of the key, unless it has one."""
    found = key.range
    if found.choices is not None:
        trial.suggest_categorical(key.name, key.names_of_choices())
        return
    assert found.low is not None and found.high is not None
    if key.whole:
        low, step = int(found.low), int(found.step or 1)
        trial.suggest_int(key.name, low, low + (int(found.high) - low) // step * step, log=found.log, step=step)
    else:
        trial.suggest_float(key.name, found.low, found.high, log=found.log, step=found.step)


def sampler(config: SearchConfig) -> Any:
    from optuna.samplers import BaseSampler, RandomSampler, TPESampler

    def seeded(number: int) -> BaseSampler:
        seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
        return RandomSampler(seed) if config.sampler == "random" else TPESampler(n_startup_trials=config.startup_trials, seed=seed)

    class SamplerByTrial(BaseSampler):
        """A sampler whose random numbers begin anew with each trial."""

        def __init__(self) -> None:
            self._now = seeded(0)

        def before_trial(self, study: Any, trial: Any) -> None:
            self._now = seeded(trial.number)
            self._now.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self._now.infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self._now.sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self._now.sample_independent(study, trial, param_name, param_distribution)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self._now.after_trial(study, trial, state, values)

    return SamplerByTrial()


def pruner(config: SearchConfig, iterations: int, every: int) -> Any:
    """For trials of `iterations` at most, with a score after each `every`."""
    from optuna.pruners import HyperbandPruner, MedianPruner, NopPruner

    if config.pruner == "median":
        return MedianPruner(n_startup_trials=config.pruner_startup_trials, n_warmup_steps=config.pruner_warmup)
    if config.pruner == "hyperband":
        least = min(max(config.pruner_warmup, every), iterations)
        return HyperbandPruner(min_resource=least, max_resource=iterations, reduction_factor=config.reduction_factor)
    return NopPruner()
