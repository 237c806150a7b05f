"""How BLEU and TER find the words of a target language: the tokenisers of sacrebleu, and which one fits.

A language that is written without spaces has no words for the tokeniser 13a: identical sentences score BLEU 0. The choice goes by the language's
code (BCP 47), or, where that is not known or cannot be, by the script of the references. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cvmk.config.training import BleuTokenizer
from cvmk.errors import ConfigError
from cvmk.validation.fallback import bleu
from cvmk.validation.scripts import unspaced_language

BLEU_TOKENIZERS = tuple(name for name in typing.get_args(BleuTokenizer) if name != "auto")

_CHINESE = frozenset("zh zho chi cmn yue wuu nan hak gan hsn lzh cdo cjy cpx czh czo mnp cnp csp".split())
_JAPANESE = frozenset("ja jpn".split())
_KOREAN = frozenset("ko kor".split())
_UNSPACED = frozenset("th tha nod tts sou lo lao km khm kxm my mya bur mnw shn rki ksw blk bo bod tib adx khg dz dzo khb tdd".split())
"""Thai, Lao, Khmer, Burmese, Tibetan and their kin: no spaces between words."""
_UNKNOWN = ("", "und", "mul", "mis", "zxx")
_SCRIPTS = {
    **dict.fromkeys(("hans", "hant", "hani", "bopo", "hanb"), "zh"),
    **dict.fromkeys(("jpan", "hrkt", "hira", "kana"), "ja"),
    **dict.fromkeys(("thai", "laoo", "khmr", "mymr", "tibt", "lana", "talu", "tale", "bali", "java"), "other"),
}
_FLORES = {"flores101": "sacrebleu_tokenizer_spm.model", "flores200": "flores200sacrebleuspm"}
"""The SentencePiece models' names in sacrebleu's folder."""
_EXTRAS = {"ja-mecab": "ja", "ko-mecab": "ko"}


@dataclass(frozen=True)
class Tokenization:
    """The tokenisers of one comparison. `note` is what a person should know about the choice, a sentence, or empty."""

    bleu: str = "13a"
    """One of BLEU_TOKENIZERS."""
    ter: str = "tercom"
    """With "tercom" words are what spaces divide; with "asian" every ideograph and full-width mark is one too."""
    note: str = ""
    better: str | None = None
    """A metric that judges such text better, where the words are a makeshift."""


def tokenization(
    language: str | None = None, references: Sequence[str] = (), bleu_tokenize: str = "auto", key: str = "validation.bleu_tokenize"
) -> Tokenization:
    """The tokenisers for texts in `language` (a BCP 47 tag such as "zh-Hant", or None), BLEU's as `bleu_tokenize` says where it is not "auto".

    Raises ConfigError, naming `key`, for a tokeniser that is unknown or cannot be used here.
    """
    if bleu_tokenize != "auto":
        check_tokenizer(bleu_tokenize, key)
    family, note = _family(language) or "spaced", ""
    if family == "spaced" and (seen := unspaced_language(references)) is not None:
        family = seen
        if _subtags(language)[0] not in _UNKNOWN:
            note = f'the references are written without spaces, which "{language}" is not'
    ter = "asian" if family in ("zh", "ja") else "tercom"
    if bleu_tokenize != "auto":
        return Tokenization(bleu_tokenize, ter, note)
    name, reason = _automatic(family)
    return Tokenization(name, ter, "; ".join(filter(None, (note, reason))), "chrf" if reason and family != "ko" else None)


def _automatic(family: str) -> tuple[str, str]:
    """The tokeniser of BLEU for a family of languages, and what there is to say about it."""
    if family in ("ja", "ko"):
        reason = unavailable(f"{family}-mecab")
        return ("char", f"BLEU counts characters instead of words here, because {reason}") if reason else (f"{family}-mecab", "")
    if family == "other":
        found = next((name for name in ("flores200", "flores101") if unavailable(name) is None), None)
        return (found, "") if found else ("char", "without spaces between words BLEU counts characters here, and TER whole phrases")
    return ("zh" if family == "zh" else "13a"), ""


def check_tokenizer(name: str, key: str) -> None:
    """Raises ConfigError where `name` is no tokeniser, or one that cannot be used here."""
    if name not in ("auto", *BLEU_TOKENIZERS):
        raise ConfigError(f"{key} is {name!r}: choose from auto, {', '.join(BLEU_TOKENIZERS)}")
    if name != "auto" and (reason := unavailable(name)) is not None:
        raise ConfigError(f"{key} is {name!r}, but {reason}")


@lru_cache
def unavailable(name: str) -> str | None:
    """Why a tokeniser of BLEU cannot be used in this process, with the remedy, or None."""
    if name in bleu.TOKENIZERS:
        return None
    if importlib.util.find_spec("sacrebleu") is None:
        return f"the tokeniser {name} needs sacrebleu: pip install sacrebleu"
    if name in _FLORES and not (file := _models() / _FLORES[name]).is_file():
        return f"the tokeniser {name} needs the file {file}, and nothing is downloaded: put it there"
    try:
        words_of(name)
    except (ImportError, RuntimeError, AssertionError, OSError) as error:
        if name in _EXTRAS:
            return f"the tokeniser {name} needs packages that are not installed: pip install 'sacrebleu[{_EXTRAS[name]}]'"
        return f"the tokeniser {name} does not load: {str(error).strip()}"
    return None


@lru_cache
def words_of(name: str) -> Callable[[str], Sequence[str]]:
    """A tokeniser of BLEU as a function from a line to its words."""
    if name in bleu.TOKENIZERS:
        return bleu.TOKENIZERS[name]
    from sacrebleu.metrics import BLEU

    split = BLEU(tokenize=name).tokenizer
    return lambda line: split(line.rstrip()).split()


def _models() -> Path:
    return Path(os.environ.get("SACREBLEU") or Path.home() / ".sacrebleu") / "models"


def _subtags(language: str | None) -> list[str]:
    return (language or "").strip().lower().replace("_", "-").split("-")


def _family(language: str | None) -> str | None:
    """"zh", "ja", "ko", "other" (without spaces), "spaced" where the tag says so by its script, None where it does not say."""
    primary, *rest = _subtags(language)
    script = next((part for part in rest if len(part) == 4 and part.isalpha()), "")
    if primary in _CHINESE:
        return "zh"  # whose tokeniser takes Latin words too
    if primary in _KOREAN:
        return "ko"
    if script:
        return _SCRIPTS.get(script, "spaced")
    return "ja" if primary in _JAPANESE else "other" if primary in _UNSPACED else None
