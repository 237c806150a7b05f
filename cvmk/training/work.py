"""How much work a step of training is: matrix products, counted from the configuration."""

from __future__ import annotations

from collections.abc import Sequence

from cvmk.config import ModelConfig
from cvmk.text.batching import Batch


def products(config: ModelConfig, batch: Batch) -> float:
    """Floating-point operations of a forward pass's matrix products without the output layer: two for each number of a matrix and real token, and
    the scores of attention with the padded length. Padding counts nothing else."""
    source, target, width = int(batch.src_lengths.sum()), batch.tokens, config.d_model
    feed = (3 if config.activation == "swiglu" else 2) * config.ffn * width
    shared = (config.kv_heads or config.heads) / config.heads  # of the keys' and values' width
    own, query, pair = (2 + 2 * shared) * width**2, 2 * width**2, 2 * shared * width**2
    layers = config.encoder_layers * source * (own + feed) + config.decoder_layers * (target * (own + query + feed) + source * pair)
    spans, ahead = batch.src.shape[1], batch.tgt_in.shape[1]
    scores = 2 * width * (config.encoder_layers * source * spans + config.decoder_layers * target * (ahead + spans))
    return 2 * (layers + scores)


def output_products(config: ModelConfig, vocabulary: int, batch: Batch) -> float:
    """Of the output layer, forward."""
    return 2.0 * batch.tokens * config.d_model * vocabulary


def phase_products(student: ModelConfig, teacher: ModelConfig | None, vocabulary: int, batches: Sequence[Batch]) -> dict[str, float]:
    """Operations of each phase of a step. A backward pass is two forward passes; the gradients of the output layer are made with the loss."""
    found = {"teacher": 0.0, "forward": 0.0, "loss": 0.0, "backward": 0.0}
    for batch in batches:
        forward = products(student, batch)
        found["forward"] += forward
        found["backward"] += 2 * forward
        found["loss"] += 3 * output_products(student, vocabulary, batch)
        if teacher is not None:
            found["teacher"] += products(teacher, batch)
            found["loss"] += output_products(teacher, vocabulary, batch)
    return found
