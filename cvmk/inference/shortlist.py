"""Which pieces of the target a source may become: so that a step looks at hundreds of pieces and not at the whole vocabulary.

Every piece of a source brings the `per_piece` pieces that it most probably becomes, by IBM Model 1 (Brown et al. 1993) on the training text; the `frequent`
commonest pieces of the target may always be said. Lexical shortlists: Jean et al. 2015. What it costs in quality is measured by translating with and
without it.

On disk: `shortlist.safetensors` in the model's folder, int32: `starts` [V + 1], `targets` (those of source piece s are starts[s] to starts[s + 1]), `frequent`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cvmk.errors import ConfigError, DataError
from cvmk.files import write_bytes
from cvmk.formats.tensors import RawTensor, read_tensors
from cvmk.inference.options import SearchOptions
from cvmk.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    import numpy as np

FILE = "shortlist.safetensors"
_AT_ONCE = 20_000  # pairs of sentences whose pieces are paired at a time
_ROUNDS = 3  # of expectation and maximisation
_REMEDY = "make it again with `cvmk shortlist`"


@dataclass(frozen=True, eq=False)
class Shortlist:
    """Arrays of int32, see above."""

    starts: np.ndarray
    targets: np.ndarray
    frequent: np.ndarray

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """starts, targets and frequent, contiguous and of int32."""
        starts, targets, frequent = (array.astype("int32", order="C", copy=False) for array in (self.starts, self.targets, self.frequent))
        return starts, targets, frequent

    def of(self, source: Sequence[int], prefix: Sequence[int] = ()) -> list[int]:
        """The pieces that a translation of these pieces may say, rising, with the end and those of the prefix."""
        found = {Tokenizer.EOS, *self.frequent.tolist(), *prefix}
        for piece in set(source):
            found.update(self.targets[self.starts[piece] : self.starts[piece + 1]].tolist())
        return sorted(found)

    def save(self, folder: Path) -> None:
        """Write it into a model's folder."""
        from safetensors.numpy import save

        write_bytes(folder / FILE, save({"starts": self.starts, "targets": self.targets, "frequent": self.frequent}))


def wanted(shortlist: Shortlist | None, options: SearchOptions) -> Shortlist | None:
    """The model's shortlist where the options ask for it. Raises ConfigError where it has none then."""
    if options.shortlist and shortlist is None:
        raise ConfigError("the model has no shortlist: make one with `cvmk shortlist`, or leave shortlist out")
    return shortlist if options.shortlist else None


def load_shortlist(folder: Path, vocab_size: int) -> Shortlist | None:
    """The shortlist of a model's folder; None where it has none. Raises DataError for one that is corrupt or of another vocabulary."""
    file = folder / FILE
    if not file.exists():
        return None
    found: dict[str, RawTensor] = read_tensors(file, remedy=_REMEDY)
    names = ("starts", "targets", "frequent")
    if set(found) != set(names) or any(tensor.dtype != "int32" or tensor.data.ndim != 1 for tensor in found.values()):
        raise DataError(f"{file} is no shortlist: {_REMEDY}")
    starts, targets, frequent = (found[name].data for name in names)
    sound = len(starts) == vocab_size + 1 and starts[0] == 0 and starts[-1] == len(targets) and bool((starts[1:] >= starts[:-1]).all())
    if not sound or any(len(ids) and not (Tokenizer.EOS <= ids.min() and ids.max() < vocab_size) for ids in (targets, frequent)):
        raise DataError(f"{file} belongs to another vocabulary or is damaged: {_REMEDY}")
    return Shortlist(starts, targets, frequent)


def build_shortlist(pairs: Iterable[tuple[Sequence[int], Sequence[int]]], vocab_size: int, per_piece: int = 100, frequent: int = 100) -> Shortlist:
    """The shortlist of aligned sentences (piece ids without special ones). Time and memory grow with the pairs of pieces that occur together."""
    import numpy as np

    corpus = [pair for pair in pairs if pair[0] and pair[1]]
    counts = np.bincount(np.concatenate([np.asarray(target, np.int64) for _, target in corpus] or [np.empty(0, np.int64)]), minlength=vocab_size)
    keys = _pairs_of_pieces(corpus, vocab_size)
    weights = np.ones(len(keys))
    for _ in range(_ROUNDS):
        weights = _maximised(keys, _expected(corpus, keys, weights, vocab_size), vocab_size)
    source, target = keys // vocab_size, keys % vocab_size
    order = np.lexsort((target, -weights, source))
    source, target = source[order], target[order]
    first = np.searchsorted(source, np.arange(vocab_size + 1))
    kept = np.arange(len(source)) - first[source] < per_piece
    starts = np.searchsorted(source[kept], np.arange(vocab_size + 1)).astype(np.int32)
    commonest = np.argsort(-counts, kind="stable")[:frequent]
    return Shortlist(starts, target[kept].astype(np.int32), np.sort(commonest[counts[commonest] > 0]).astype(np.int32))


def _blocks(corpus: Sequence[tuple[Sequence[int], Sequence[int]]], vocab_size: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """The key (source piece * V + target piece) of every two pieces of a sentence pair, and the number of the target's place, block by block."""
    import numpy as np

    for start in range(0, len(corpus), _AT_ONCE):
        keys, places, place = [], [], 0
        for source, target in corpus[start : start + _AT_ONCE]:
            s, t = np.asarray(source, np.int64), np.asarray(target, np.int64)
            keys.append((s[:, None] * vocab_size + t).ravel())
            places.append(np.broadcast_to(place + np.arange(len(t)), (len(s), len(t))).ravel())
            place += len(t)
        yield np.concatenate(keys), np.concatenate(places)


def _pairs_of_pieces(corpus: Sequence[tuple[Sequence[int], Sequence[int]]], vocab_size: int) -> np.ndarray:
    import numpy as np

    found = np.empty(0, np.int64)
    for keys, _ in _blocks(corpus, vocab_size):
        found = np.union1d(found, keys)
    return found


def _expected(corpus: Sequence[tuple[Sequence[int], Sequence[int]]], keys: np.ndarray, weights: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each pair of pieces is one the translation of the other, by the weights so far."""
    import numpy as np

    counts = np.zeros(len(keys))
    for block, places in _blocks(corpus, vocab_size):
        at = np.searchsorted(keys, block)
        share = weights[at] / np.bincount(places, weights[at])[places]
        counts += np.bincount(at, share, len(keys))
    return counts


def _maximised(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> np.ndarray:
    """The probabilities of the targets of each source."""
    import numpy as np

    source = keys // vocab_size
    found: np.ndarray = counts / np.maximum(np.bincount(source, counts, vocab_size)[source], 1e-300)
    return found
