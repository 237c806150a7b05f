"""An export to ONNX (`cvmk.formats.onnx`), run by onnxruntime: greedy search and the log-probability of a translation, without torch in the process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cvmk.errors import ConfigError, DataError
from cvmk.files import read_json
from cvmk.formats.manifest import CONFIG
from cvmk.formats.onnx import DECODER, ENCODER, FORMAT, need
from cvmk.inference import onnx_search
from cvmk.inference.onnx_search import Rows
from cvmk.inference.options import SearchOptions
from cvmk.inference.translator import batches
from cvmk.text.lines import trimmed
from cvmk.text.tokenizers import Tokenizer, load_tokenizer

_NUMBERS = ("vocab_size", "pad_id", "max_length", "kv_heads", "head_size", "decoder_layers")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRunner:
    """The two sessions of a folder, its tokenizer and `info`, its config.json.

    `threads` None leaves their number to onnxruntime. Raises ConfigError where onnxruntime is not installed or has not the device, DataError where the folder
    is no sound export.
    """

    def __init__(self, folder: str | os.PathLike[str], *, device: Literal["cpu", "cuda"] = "cpu", threads: int | None = None) -> None:
        need("onnxruntime")
        folder = Path(folder)
        self.info = _described(folder)
        self.tokenizer = load_tokenizer(folder)
        if self.tokenizer.fingerprint != self.info.get("tokenizer"):
            raise DataError(f"the tokenizer in {folder} is not the one that the model was exported with (its fingerprint differs from {CONFIG}): restore it")
        self.max_length: int = self.info["max_length"]
        self._encoder, self._decoder = (_session(folder / file, device, threads) for file in (ENCODER, DECODER))
        self._layers = range(self.info["decoder_layers"])
        self._read = [value.name for value in self._encoder.get_outputs() if value.name != "encoded"]
        self._past = [f"{index}.{kind}" for index in self._layers for kind in ("keys", "values")]

    # -- the two graphs --------------------------------------------------------------------------------------------------------------
    def start(self, sources: Sequence[Sequence[int]]) -> Rows:
        """Encode sources (pieces without EOS, at least one source) -> rows that have read nothing."""
        width = max(map(len, sources)) + 1
        padded = np.full((len(sources), width), self.info["pad_id"], np.int64)
        for row, source in zip(padded, sources, strict=True):
            row[: len(source) + 1] = [*source, Tokenizer.EOS]
        found = dict(zip(self._read, self._encoder.run(self._read, {"source": padded}), strict=True))
        empty = np.zeros((len(sources), self.info["kv_heads"], 0, self.info["head_size"]), np.float32)
        return Rows({**found, **{f"past.{name}": empty for name in self._past}})

    def extend(self, tokens: np.ndarray, rows: Rows) -> np.ndarray:
        """tokens int64 [N, T], the next of each row -> logits float32 [N, T, V]; the rows have read them."""
        logits, *present = self._decoder.run(["logits", *(f"present.{name}" for name in self._past)], {"tokens": tokens, **rows.inputs})
        rows.inputs.update(zip((f"past.{name}" for name in self._past), present, strict=True))
        found: np.ndarray = logits
        return found

    # -- search ----------------------------------------------------------------------------------------------------------------------
    def search(self, sources: Sequence[Sequence[int]], limits: Sequence[int], beam_size: int = 1) -> list[list[int]]:
        """The pieces, without EOS, of the translation of each source (pieces without EOS), at most limits[b], 1 or more: what `Translator.translate` finds with
        its defaults and this beam."""
        if not sources:
            return []
        return onnx_search.greedy(self, sources, limits) if beam_size == 1 else onnx_search.beam(self, sources, limits, beam_size)

    def translate(self, texts: Sequence[str], *, beam_size: int = 1, max_batch_tokens: int = 4096) -> list[list[int]]:
        """The pieces of each text's translation, [] of one without content; a text that is too long loses its end. `max_batch_tokens` bounds the source pieces,
        padding included, times beam_size, that are translated at once. Raises ConfigError for another beam_size than `SearchOptions` has."""
        options, found = SearchOptions(beam_size), [list[int]() for _ in texts]
        sources = [source[: self.max_length - 1] for source in self.tokenizer.encode_many([trimmed(text) for text in texts])]
        for batch in batches([len(source) for source in sources], max_batch_tokens // beam_size):
            limits = [options.limit(len(sources[index]), self.max_length) for index in batch]
            for index, pieces in zip(batch, self.search([sources[index] for index in batch], limits, beam_size), strict=True):
                found[index] = pieces
        return found

    # -- beside another engine ---------------------------------------------------------------------------------------------------------
    def greedy(self, source: Sequence[int], limit: int) -> list[int]:
        """`search` of one source."""
        return self.search([source], [limit])[0]

    def log_probability(self, source: Sequence[int], target: Sequence[int]) -> float:
        """log p(target and EOS | source) by the model, of pieces without special ones."""
        said = [*target, Tokenizer.EOS]
        logits = self.extend(np.array([[Tokenizer.BOS, *target]], np.int64), self.start([source]))[0].astype(np.float64)
        highest = logits.max(axis=1, keepdims=True)
        normalised = logits - highest - np.log(np.exp(logits - highest).sum(axis=1, keepdims=True))
        return float(normalised[np.arange(len(said)), said].sum())


def _described(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise DataError(f"{folder} holds no export to ONNX (no {CONFIG} in it): write one with cvmk export --to onnx")
    info = read_json(folder / CONFIG)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise DataError(f"{folder / CONFIG} describes no export to ONNX: write one with cvmk export --to onnx")
    wrong = [key for key in _NUMBERS if type(info.get(key)) is not int]
    if wrong:
        raise DataError(f"{folder / CONFIG} has no valid key {wrong[0]!r}: export the model again")
    return info


def _session(file: Path, device: str, threads: int | None) -> Any:
    import onnxruntime

    if device not in _PROVIDERS:
        raise ConfigError(f"device is {device!r}, and must be one of {', '.join(_PROVIDERS)}")
    if _PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise ConfigError(f"onnxruntime has no {_PROVIDERS[device]} here: install the package onnxruntime-gpu, or use the device cpu")
    if not file.is_file():
        raise DataError(f"{file} is missing: export the model again")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact 8-bit products on processors without VNNI, where sums would saturate
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(os.fspath(file), options, providers=[_PROVIDERS[device]])
    except Exception as error:  # the runtime has no base class of its own for what a file may lack
        raise DataError(f"{file} cannot be loaded by onnxruntime ({str(error).splitlines()[0]}): export the model again") from error
