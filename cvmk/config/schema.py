"""Every key of a configuration file: its type, its default, its limits and its meaning.

`cvmk train --explain-config` prints this file's descriptions; there is no other list of keys.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Mixer = Literal["attention"]
Divergence = Literal["forward_kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl"]
LayerMap = Literal["uniform", "last"] | list[tuple[int, int]]
Metric = Literal["bleu", "chrf", "ter", "rouge", "bertscore"]
Share = Annotated[float, Field(ge=0, lt=1)]
MAX_THREADS = 1024


class Section(BaseModel):
    """A table of the TOML file. Unknown keys are errors, values are not coerced across types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class RunConfig(Section):
    folder: str = Field("runs/run", description="Folder of this run: configuration, logs, checkpoints, reports. Relative to the working directory.")
    seed: int = Field(1, ge=0, lt=2**32, description="Seed of everything random: initial weights, data order, dropout.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train; auto takes a GPU where there is one.")
    threads: int = Field(0, ge=0, le=MAX_THREADS, description="CPU threads; 0 leaves the choice to PyTorch.")


class CorpusConfig(Section):
    """One parallel corpus: two aligned text files, one TSV file, or one JSONL file; each may end in .gz."""

    source: str | None = Field(None, description="Source sentences, one a line (with `target`).")
    target: str | None = Field(None, description="Target sentences, one a line (with `source`).")
    tsv: str | None = Field(None, description="A file with source and target separated by a tab.")
    jsonl: str | None = Field(None, description="A file with one JSON object a line; keys as data.jsonl_source and data.jsonl_target say.")

    @model_validator(mode="after")
    def _one_form(self) -> CorpusConfig:
        given = [name for name in ("tsv", "jsonl") if getattr(self, name)]
        pair = [name for name in ("source", "target") if getattr(self, name)]
        if len(given) + bool(pair) != 1 or len(pair) == 1:
            raise ValueError("give either source and target, or tsv, or jsonl")
        return self


class DataConfig(Section):
    embedded: Literal["phrasebook"] | None = Field(None, description="Use the embedded English-German phrasebook instead of files.")
    phrasebook_pairs: int = Field(20000, ge=1000, le=200000, description="Number of training pairs that the phrasebook generates.")
    folder: str = Field(".", description="Folder that the corpus files' names are relative to; itself relative to the working directory.")
    source_language: str = Field("en", description="Language code of the source, ISO 639-1.")
    target_language: str = Field("de", description="Language code of the target, ISO 639-1.")
    train: CorpusConfig | None = Field(None, description="Training pairs.")
    valid: CorpusConfig | None = Field(None, description="Validation pairs: they choose the best checkpoint.")
    test: CorpusConfig | None = Field(None, description="Held-out pairs, scored once at the end.")
    jsonl_source: str = Field("source", description="Key of the source sentence in JSONL files.")
    jsonl_target: str = Field("target", description="Key of the target sentence in JSONL files.")
    on_bad_line: Literal["error", "skip"] = Field(
        "error",
        description="What to do with invalid UTF-8, empty lines, and over-long pairs of the training data: stop, or skip and count them.",
    )
    max_tokens_per_sentence: int = Field(256, ge=2, description="A training pair with a longer side is over-long.")
    max_length_ratio: float = Field(0.0, ge=0, description="A training pair whose token counts differ by more than this factor is over-long; 0 = no limit.")
    cache: str = Field("", description="Folder of the tokenised cache; empty = `cache` beside the run's checkpoints.")

    @model_validator(mode="after")
    def _some_data(self) -> DataConfig:
        if self.embedded is None and (self.train is None or self.valid is None):
            raise ValueError('give data.train and data.valid, or data.embedded = "phrasebook"')
        if self.embedded is not None and (self.train or self.valid or self.test):
            raise ValueError("data.embedded and data.train, data.valid, data.test exclude each other")
        return self


class TokenizerConfig(Section):
    kind: Literal["bpe", "unigram", "fallback"] = Field(
        "bpe",
        description="SentencePiece BPE or unigram, or the plain-Python fallback; the SentencePiece kinds need the package sentencepiece.",
    )
    path: str | None = Field(None, description="Folder with a tokenizer to use; without it one is trained on the training data.")
    vocabulary: int = Field(8000, ge=64, le=256000, description="Pieces, special ones included, when it is trained; source and target share them.")
    character_coverage: float = Field(1.0, gt=0.9, le=1.0, description="Share of characters that get a piece of their own; others are spelt in bytes.")


class ModelConfig(Section):
    d_model: int = Field(256, ge=8, le=65536, description="Width of the residual stream.")
    ffn: int = Field(1024, ge=8, le=262144, description="Width of the feed-forward layers.")
    heads: int = Field(4, ge=1, description="Attention heads.")
    kv_heads: int | None = Field(None, ge=1, description="Key and value heads (grouped-query attention); default: as many as heads.")
    encoder_layers: int = Field(4, ge=1, le=256, description="Encoder blocks.")
    decoder_layers: int = Field(4, ge=1, le=256, description="Decoder blocks.")
    encoder_mixers: list[Mixer] = Field(["attention"], min_length=1, description="Mixers of the encoder blocks, repeated in this order to fill them.")
    decoder_mixers: list[Mixer] = Field(
        ["attention"], min_length=1,
        description="Self-mixers of the decoder blocks, repeated in this order to fill them; cross-attention is always attention.",
    )
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="Normalisation before each sublayer and at the end of each stack.")
    norm_eps: float = Field(1e-5, gt=0, description="Epsilon of the normalisation.")
    positions: Literal["sinusoidal", "rotary"] = Field("sinusoidal", description="Absolute sinusoidal positions, or rotary ones in self-attention.")
    rotary_base: float = Field(10000.0, gt=1, description="Base of the rotary frequencies.")
    activation: Literal["relu", "gelu", "swiglu"] = Field("relu", description="Feed-forward activation.")
    bias: bool = Field(True, description="Biases in the linear layers.")
    tie_embeddings: bool = Field(True, description="One matrix for source embeddings, target embeddings and output.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout of embeddings and sublayer outputs.")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of attention weights.")
    max_length: int = Field(512, ge=8, le=65536, description="Longest source or target in tokens.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> ModelConfig:
        if self.d_model % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide d_model ({self.d_model})")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.positions == "rotary" and (self.d_model // self.heads) % 2:
            raise ValueError("rotary positions need an even head size (d_model / heads)")
        return self


class SequenceLevelConfig(Section):
    enabled: bool = Field(
        False,
        description="Train on the teacher's beam-search translations of the training sources (Kim & Rush 2016); they are written once and reused.",
    )
    beam_size: Annotated[int, Field(ge=1, le=16)] = Field(4, description="Beam of the teacher.")
    mix: Literal["replace", "append"] = Field("append", description="Replace the references by the teacher's translations, or train on both.")


class DistillationConfig(Section):
    alpha: float = Field(0.5, ge=0, le=1, description="Logits: alpha * T^2 * divergence + (1 - alpha) * cross-entropy with the references.")
    beta: float = Field(0.0, ge=0, description="Weight of the hidden-state loss: mean squared error after a learned projection.")
    gamma: float = Field(0.0, ge=0, description="Weight of the attention-map loss: KL(teacher || student) a row.")
    temperature: float = Field(1.0, gt=0, description="Temperature T of both distributions.")
    divergence: Divergence = Field("forward_kl", description="Divergence between the teacher's and the student's distributions.")
    mixture: float | None = Field(None, gt=0, lt=1, description="Mixing weight of js (default 0.5) and of the skew divergences (default 0.1).")
    layer_map: LayerMap = Field(
        "uniform",
        description='Which teacher layer a student layer imitates: "uniform", "last", or pairs [student, teacher], counted from 0.',
    )
    hidden: list[Literal["encoder", "decoder"]] = Field(["encoder", "decoder"], description="Stacks whose hidden states are compared.")
    attention: list[Literal["encoder", "decoder", "cross"]] = Field(
        ["encoder", "decoder", "cross"],
        description="Attention maps that are compared: encoder self, decoder self, cross.",
    )
    sequence_level: SequenceLevelConfig = Field(SequenceLevelConfig(), description="Sequence-level distillation.")


class OptimizerConfig(Section):
    name: Literal["adamw"] = Field("adamw", description="Optimiser.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    betas: tuple[Share, Share] = Field((0.9, 0.98), description="Decay rates of Adam's moments.")
    eps: float = Field(1e-9, gt=0, description="Epsilon of Adam.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay of the matrices; norms, biases and embeddings have none.")


class ScheduleConfig(Section):
    kind: Literal["cosine", "inverse_sqrt", "constant"] = Field("inverse_sqrt", description="Course of the learning rate after the warm-up.")
    warmup: int = Field(1000, ge=0, description="Iterations of linear warm-up.")
    final_factor: float = Field(0.05, ge=0, le=1, description="Cosine: the last learning rate as a share of the peak.")


class TrainingConfig(Section):
    iterations: int = Field(10000, ge=1, description="Optimiser steps.")
    max_tokens: int = Field(4096, ge=16, description="Tokens of a batch, padding included, the larger side counted.")
    accumulate: int = Field(1, ge=1, description="Batches whose gradients are added up for one step.")
    clip_norm: float = Field(1.0, ge=0, description="Largest gradient norm; 0 = no clipping.")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="Label smoothing of the cross-entropy with the references.")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16 = autocast.")
    save_every: int = Field(500, ge=1, description="Iterations between checkpoints.")
    keep: int = Field(2, ge=1, description="Step checkpoints kept besides best and last.")
    average: int = Field(
        5, ge=1,
        description="Checkpoint averaging: the final model is the mean of the weights at the last so many validations, if that scores better; 1 = off.",
    )
    log_every: int = Field(50, ge=1, description="Iterations between log lines.")


class ValidationConfig(Section):
    validate_every: int = Field(1000, ge=1, description="Iterations between validations; the last iteration is always validated.")
    metric: Metric = Field("bleu", description="Metric that chooses the best checkpoint.")
    metrics: list[Metric] = Field(["bleu", "chrf", "ter"], min_length=1, description="Metrics that are reported.")
    beam_size: int = Field(1, ge=1, le=16, description="Beam of the validation translations.")
    max_sentences: int = Field(1000, ge=1, description="Validate on the first so many pairs.")
    patience: int = Field(10, ge=0, description="Stop after so many validations without a better metric; 0 = never.")
    min_delta: float = Field(0.0, ge=0, description="Improvement of the metric that counts as better.")
    bootstrap: int = Field(500, ge=50, description="Resamples of the paired bootstrap.")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="Confidence of the bootstrap interval; a drop outside it is a regression.")


class GuardConfig(Section):
    max_rollbacks: int = Field(3, ge=0, description="Returns to the best checkpoint before the run stops with exit code 4.")
    learning_rate_factor: float = Field(0.5, gt=0, le=1, description="Learning rate factor after each rollback.")
    loss_factor: float = Field(4.0, gt=1, description="A loss above this multiple of its moving average, `window` times in a row, is divergence.")
    gradient_factor: float = Field(
        1000.0, gt=1,
        description="A gradient norm above this multiple of its moving average, `window` times in a row, is divergence.",
    )
    window: int = Field(10, ge=1, description="Iterations in a row that make an exploding loss or gradient a divergence; a non-finite one counts at once.")
    rollback_on_regression: bool = Field(
        True,
        description="Return to the best checkpoint also when the validation metric drops outside its bootstrap interval.",
    )


class Recipe(Section):
    """What it takes to train one model."""

    model: ModelConfig = Field(ModelConfig(), description="The model to train.")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="The optimiser.")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="The learning rate.")
    training: TrainingConfig = Field(TrainingConfig(), description="The loop.")
    validation: ValidationConfig = Field(ValidationConfig(), description="Scores during training.")
    guard: GuardConfig = Field(GuardConfig(), description="Rollback on divergence and regression.")


class TeacherConfig(Recipe):
    """The teacher: a finished model's folder, or a recipe that is run first on the same data and tokenizer."""

    path: str | None = Field(
        None,
        description="Folder of a finished run or model; without it the teacher is trained first, by the tables below, into `teacher` in the run's folder.",
    )


class TrainConfig(Recipe):
    """The whole of a training configuration."""

    run: RunConfig = Field(RunConfig(), description="Where and how to run.")
    data: DataConfig = Field(description="The parallel text.")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="Words to pieces.")
    teacher: TeacherConfig | None = Field(None, description="The model to distil; without it the model is trained on the references alone.")
    distillation: DistillationConfig = Field(DistillationConfig(), description="What the student learns from the teacher.")

    @model_validator(mode="after")
    def _sentences_fit(self) -> TrainConfig:
        longest = self.data.max_tokens_per_sentence + 1  # BOS or EOS
        models = [("model", self.model)] + ([("teacher.model", self.teacher.model)] if self.teacher is not None and self.teacher.path is None else [])
        for name, model in models:
            if longest > model.max_length:
                raise ValueError(
                    f"data.max_tokens_per_sentence ({longest - 1}) must be below {name}.max_length ({model.max_length})"
                )
        return self
