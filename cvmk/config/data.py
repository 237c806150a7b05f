"""`[data]` and `[tokenizer]`: the parallel text, and how it becomes pieces."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cvmk.config.languages import language_tag
from cvmk.config.section import BY_CONTENT, MAY_CHANGE, Formerly, Section

PHRASEBOOK_LANGUAGES = {"source_language": "en", "target_language": "de"}


class CorpusConfig(Section):
    """One parallel corpus: two aligned text files, one TSV file, or one JSONL file; each plain or compressed (gzip, xz, bzip2, Zstandard)."""

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
    folder: Annotated[str, BY_CONTENT] = Field(
        ".",
        description="Folder that the corpus files' names are relative to; itself relative to the working directory.",
    )
    source_language: Annotated[str | None, Formerly("en")] = Field(
        None,
        description='Language of the source, a BCP 47 tag such as "de", "hsb", "pt-BR" or "zh-Hant"; without it the model\'s card calls it unknown.',
    )
    target_language: Annotated[str | None, Formerly("de")] = Field(
        None,
        description="Language of the target, likewise; it also chooses how BLEU and TER find words, which goes by the references' script without it.",
    )
    train: Annotated[CorpusConfig | None, BY_CONTENT] = Field(None, description="Training pairs.")
    valid: Annotated[CorpusConfig | None, BY_CONTENT] = Field(None, description="Validation pairs: they choose the best checkpoint.")
    test: Annotated[CorpusConfig | None, BY_CONTENT] = Field(None, description="Held-out pairs, scored once at the end.")
    jsonl_source: Annotated[str, BY_CONTENT] = Field("source", description="Key of the source sentence in JSONL files.")
    jsonl_target: Annotated[str, BY_CONTENT] = Field("target", description="Key of the target sentence in JSONL files.")
    on_bad_line: Literal["error", "skip"] = Field(
        "error",
        description="What to do with invalid UTF-8, empty lines, and over-long pairs of the training data: stop, or skip and count them.",
    )
    max_tokens_per_sentence: int = Field(256, ge=2, description="A training pair with a longer side is over-long.")
    max_length_ratio: float = Field(0.0, ge=0, description="A training pair whose token counts differ by more than this factor is over-long; 0 = no limit.")
    cache: Annotated[str, MAY_CHANGE] = Field("", description="Folder of the tokenised cache; empty = `cache` beside the run's checkpoints.")

    @model_validator(mode="before")
    @classmethod
    def _languages_of_the_phrasebook(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("embedded") == "phrasebook":
            return PHRASEBOOK_LANGUAGES | values
        return values

    @field_validator("source_language", "target_language")
    @classmethod
    def _known_language(cls, code: str | None) -> str | None:
        tag = None if code is None else language_tag(code)
        return None if tag == "und" else tag

    @model_validator(mode="after")
    def _some_data(self) -> DataConfig:
        if self.embedded is None and (self.train is None or self.valid is None):
            raise ValueError('give data.train and data.valid, or data.embedded = "phrasebook"')
        if self.embedded is not None and (self.train or self.valid or self.test):
            raise ValueError("data.embedded and data.train, data.valid, data.test exclude each other")
        if self.embedded is not None and any((getattr(self, key) or "").split("-")[0] != code for key, code in PHRASEBOOK_LANGUAGES.items()):
            raise ValueError("the embedded phrasebook is English-German: leave out data.source_language and data.target_language")
        return self

    @property
    def languages(self) -> dict[str, str | None] | None:
        """What a model's description says of its languages: {"source": tag, "target": tag}, None for one that is unknown or for both."""
        found = {"source": self.source_language, "target": self.target_language}
        return found if any(found.values()) else None


class TokenizerConfig(Section):
    kind: Literal["bpe", "unigram", "fallback"] = Field(
        "bpe",
        description="SentencePiece BPE or unigram, or the plain-Python fallback; the SentencePiece kinds need the package sentencepiece.",
    )
    path: Annotated[str | None, BY_CONTENT] = Field(None, description="Folder with a tokenizer to use; without it one is trained on the training data.")
    vocabulary: int = Field(8000, ge=64, le=256000, description="Pieces, special ones included, when it is trained; source and target share them.")
    normalization: Annotated[Literal["nfc", "nmt_nfkc", "identity"], Formerly("identity")] = Field(
        "nfc",
        description="What happens to text before it becomes pieces, in training and in use, when the tokenizer is trained: nfc composes letters and their "
        "accents, nmt_nfkc (SentencePiece's rule) also folds widths, ligatures, no-break spaces and control characters, identity does nothing.",
    )
    character_coverage: float = Field(1.0, gt=0.9, le=1.0, description="Share of characters that get a piece of their own; others are spelt in bytes.")
