"""What models with other mixers cost on this machine: training steps and steps of decoding. All models take turns, so that what else the machine does meets
all of them. Weights are new: a step costs what it costs."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from cvmk.config import DistillationConfig
from cvmk.config.model import ModelConfig
from cvmk.config.schema import TrainConfig
from cvmk.distill import DistillationObjective
from cvmk.inference.torch_engine import check_device
from cvmk.nn import CVMTransformer
from cvmk.text.batching import Batch, TokenBatchSampler, collate
from cvmk.text.cache import TokenizedCorpus
from cvmk.text.tokenizers import Tokenizer
from cvmk.training.optimizers import build_optimizer
from cvmk.training.schedule import learning_rate_factor
from cvmk.training.step import TrainingStep
from cvmk.training.world import World

_DRAWN, _LEAST, _ROUNDS = 16, 3, 3


def training(configs: Mapping[str, TrainConfig], corpus: TokenizedCorpus, tokenizer: Tokenizer, seconds: float) -> dict[str, Any]:
    """Training steps as `cvmk train` takes them, on its first batches: in each round every model takes one, all on the same batches. Rounds begin until some
    `seconds` a model are over, and at least three.

    `tokens` holds the target tokens of each round, `seconds` by name what the step took.
    """
    config = next(iter(configs.values()))
    device = check_device(config.run.device)
    sampler = TokenBatchSampler(corpus.lengths, config.training.max_tokens, config.run.seed)
    drawn = [[collate(corpus, next(sampler)).to(device) for _ in range(config.training.accumulate)] for _ in range(_DRAWN)]
    steps = {name: _step(one, tokenizer.vocab_size, device) for name, one in configs.items()}
    for step in steps.values():
        step(drawn[0])  # what only the first one costs
    tokens, took = list[int](), {name: list[float]() for name in steps}
    end = time.perf_counter() + seconds * len(steps)
    while len(tokens) < _LEAST or time.perf_counter() < end:
        batches = drawn[len(tokens) % _DRAWN]
        tokens.append(sum(batch.tokens for batch in batches))
        for name, step in steps.items():
            start = time.perf_counter()
            step(batches)
            took[name].append(time.perf_counter() - start)
    return {"tokens": tokens, "seconds": took}


def _step(config: TrainConfig, vocabulary: int, device: torch.device) -> Callable[[Sequence[Batch]], None]:
    """A step of a new model's training, at the learning rate of its first one."""
    torch.manual_seed(config.run.seed)
    model = CVMTransformer(config.model, vocabulary, Tokenizer.PAD).to(device)
    smoothing = config.training.label_smoothing
    objective = DistillationObjective(DistillationConfig(alpha=0.0), label_smoothing=smoothing, student=config.model, teacher=None, vocab_size=vocabulary).to(
        device
    )
    optimizer = build_optimizer(config.optimizer, (model, objective))
    step = TrainingStep(model, None, objective, optimizer, precision=config.training.precision, clip_norm=config.training.clip_norm, world=World())
    factor = learning_rate_factor(config.schedule, 1, config.training.iterations)

    def take(batches: Sequence[Batch]) -> None:
        step(batches, factor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return take


def decoding(configs: Mapping[str, ModelConfig], lengths: Sequence[int], steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """By name and length of a source of random tokens: the median milliseconds of a step of decoding, one sentence in float32 by PyTorch's engine, behind as
    many tokens that are said; and the bytes of its state there. Each model takes `steps` in turn, three times."""
    taken = _ROUNDS * (steps + 1)
    longest = max(lengths) + taken
    models = {name: CVMTransformer(config.model_copy(update={"max_length": longest}), 1000).eval() for name, config in configs.items()}
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    for length in lengths:
        with torch.inference_mode():
            tokens = torch.randint(4, 1000, (1, length))
            states = {name: model.start(model.encode(tokens), length + taken) for name, model in models.items()}
            for name, state in states.items():
                models[name].extend(tokens, state)
            times: dict[str, list[float]] = {name: [] for name in models}
            for _, name in itertools.product(range(_ROUNDS), models):
                times[name] += _timed(models[name], states[name], steps)
        for name, model in models.items():
            found[name][str(length)] = {"milliseconds": 1e3 * statistics.median(times[name]), "bytes": model.decoder_state_bytes(length, length)}
    return found


def _timed(model: CVMTransformer, state: Any, steps: int) -> list[float]:
    """Seconds of each step, behind one that brings the model's weights back into the caches."""
    token, times = torch.full((1,), 5), []
    for _ in range(steps + 1):
        start = time.perf_counter()
        model.step(token, state)
        times.append(time.perf_counter() - start)
    return times[1:]
