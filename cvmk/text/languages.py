"""Language codes: ISO 639-1 with an optional script (ISO 15924) and region (ISO 3166-1 or UN M.49)."""

from __future__ import annotations

import difflib
import re

from cvmk.errors import ConfigError

ISO_639_1 = frozenset(
    """
    aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo es
    et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki
    kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no
    nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su sv sw ta te
    tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
    """.split()
)

# What people write instead: language names, three-letter codes, country codes, withdrawn codes.
_MEANT = {
    "english": "en", "eng": "en", "gb": "en", "us": "en", "german": "de", "deutsch": "de", "deu": "de", "ger": "de",
    "french": "fr", "fra": "fr", "fre": "fr", "spanish": "es", "spa": "es", "italian": "it", "ita": "it", "dutch": "nl",
    "nld": "nl", "dut": "nl", "portuguese": "pt", "por": "pt", "br-pt": "pt-BR", "russian": "ru", "rus": "ru",
    "chinese": "zh", "zho": "zh", "chi": "zh", "cn": "zh", "japanese": "ja", "jpn": "ja", "jp": "ja", "korean": "ko",
    "kor": "ko", "arabic": "ar", "ara": "ar", "czech": "cs", "ces": "cs", "cz": "cs", "polish": "pl", "pol": "pl",
    "turkish": "tr", "tur": "tr", "ukrainian": "uk", "ukr": "uk", "ua": "uk", "swedish": "sv", "swe": "sv", "danish": "da",
    "dan": "da", "dk": "da", "greek": "el", "gr": "el", "hindi": "hi", "hin": "hi", "hebrew": "he", "iw": "he",
    "in": "id", "ji": "yi", "jw": "jv", "mo": "ro", "sh": "sr",
}  # fmt: skip

_FORM = re.compile(r"([a-z]{2})(-[A-Z][a-z]{3})?(-(?:[A-Z]{2}|[0-9]{3}))?")


def check_language(code: str, key: str = "language code") -> str:
    """Return `code` where it is known: "de", "pt-BR", "zh-Hant", "sr-Latn-RS".

    Raises ConfigError otherwise; the sentence names `key` and the nearest known code.
    """
    match = _FORM.fullmatch(code)
    if match and match[1] in ISO_639_1:
        return code
    raise ConfigError(f'{key} "{code}" is unknown: did you mean "{_nearest(code)}"? (codes are ISO 639-1 such as "de", or with a region such as "pt-BR")')


def _nearest(code: str) -> str:
    lowered = code.strip().lower().replace("_", "-")
    language, _, rest = lowered.partition("-")
    language = _MEANT.get(lowered) or _MEANT.get(language) or language
    if language not in ISO_639_1 and "-" not in language:
        close = difflib.get_close_matches(language, sorted(ISO_639_1 | _MEANT.keys()), n=1, cutoff=0.0)[0]
        language = _MEANT.get(close, close)
    parts = [part.title() if len(part) == 4 else part.upper() for part in rest.split("-") if len(part) in (2, 4) and part.isalpha()]
    candidate = "-".join([language, *parts])
    return candidate if _FORM.fullmatch(candidate) else language
