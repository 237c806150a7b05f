"""Language tags (BCP 47): known to the registry of the package langcodes, and written as the standard writes them."""

from __future__ import annotations

import difflib
import functools
import json
import re

from cvmk.errors import ConfigError

_FORMS = 'tags are BCP 47, such as "de", "hsb", "pt-BR" or "zh-Hant"'

_LONGEST = 256  # characters; so long a tag says nothing that a model goes by

# What languages call themselves, and what people write for them; their English names are in the registry.
_OWN_NAMES = {
    "deutsch": "de", "français": "fr", "francais": "fr", "español": "es", "espanol": "es", "italiano": "it", "nederlands": "nl",
    "português": "pt", "portugues": "pt", "polski": "pl", "čeština": "cs", "cesky": "cs", "svenska": "sv", "dansk": "da",
    "norsk": "no", "suomi": "fi", "türkçe": "tr", "русский": "ru", "українська": "uk", "ελληνικά": "el", "العربية": "ar",
    "עברית": "he", "हिन्दी": "hi", "中文": "zh", "汉语": "zh", "漢語": "zh", "日本語": "ja", "한국어": "ko", "tiếng việt": "vi",
    "greek": "el", "mandarin": "zh", "farsi": "fa", "brazilian portuguese": "pt-BR", "kz": "kk",
    "simplified chinese": "zh-Hans", "zh-chs": "zh-Hans", "traditional chinese": "zh-Hant", "zh-cht": "zh-Hant",
}  # fmt: skip


def language_tag(code: str) -> str:
    """`code` as the standard writes it: "DE" and "deu" are "de", "pt_br" is "pt-BR", "iw" is "he".

    Raises ValueError, a sentence with the nearest tag where one is near, for what is no registered language, script or region.
    """
    if (tag := _standard(code)) is not None:
        return tag
    nearest = _nearest(code)
    meant = f'did you mean "{nearest}"? ({_FORMS})' if nearest else _FORMS
    raise ValueError(f"{json.dumps(code, ensure_ascii=False)} is no language that is known: {meant}")


def check_language(code: str, key: str = "language code") -> str:
    """`language_tag`, with a ConfigError that names `key`."""
    try:
        return language_tag(code)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def _standard(code: str) -> str | None:
    if len(code) > _LONGEST or not re.fullmatch(r"[A-Za-z0-9]+([-_][A-Za-z0-9]+)*", code):
        return None
    return _registered(code)


@functools.lru_cache(maxsize=1024)
def _registered(code: str) -> str | None:
    import langcodes  # slow to import

    if not langcodes.tag_is_valid(code):
        return None
    tag = langcodes.standardize_tag(code)
    return None if langcodes.Language.get(tag).extlangs else tag  # a known one has been replaced by its own subtag


def _nearest(code: str) -> str | None:
    """What may have been meant: the tag without what is too much, the language of that name, or the language of that country."""
    import langcodes

    text = re.sub(r"[\s_]+", "-", code.strip().casefold()).strip("-")
    if not text:
        return None
    names = _names()
    first, *rest = text.split("-")
    for name in (text, text.replace("-", " "), first):
        if (found := _standard(name) or names.get(name)) is not None:
            return found
    for country in (first, *rest):
        if re.fullmatch("[a-z]{2}", country) and not re.fullmatch("aa|q[m-z]|x[a-z]|zz", country):  # codes for private use
            return langcodes.Language.make(territory=country.upper()).maximize().language
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.75)
    return names[close[0]] if close else None


def _names() -> dict[str, str]:
    """Languages by name, in lower case; of several of one name the first in the registry, where those of two letters come first."""
    try:
        from langcodes.registry_parser import parse_registry
    except ImportError:  # another version of the package
        return dict(_OWN_NAMES)
    found: dict[str, str] = {}
    for entry in parse_registry():
        if entry["Type"] == "language" and not {"Deprecated", "Preferred-Value"} & entry.keys():
            for name in entry["Description"]:
                found.setdefault(re.sub(r" \(.*\)$", "", name).casefold(), entry["Subtag"])
    return found | _OWN_NAMES
