"""Language tags: what is known, how it is written, what is suggested."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from cvmk.config import DataConfig, TrainConfig
from cvmk.config.languages import check_language, language_tag
from cvmk.config.resume import changed_keys
from cvmk.errors import ConfigError

FILES = {"train": {"tsv": "a"}, "valid": {"tsv": "a"}}
ISO_639_1 = """
    aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo es et eu fa ff fi fj fo fr fy ga
    gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu
    lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so
    sq sr ss st su sv sw ta te tg th ti tk tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu""".split()


@pytest.mark.parametrize(
    "tag", [*ISO_639_1, "hsb", "ceb", "yue", "gsw", "fil", "tlh", "pt-BR", "zh-Hant", "zh-Hans-SG", "sr-Latn-RS", "es-419", "ca-valencia", "de-1996", "mul"]
)
def test_tags_stay_as_the_standard_writes_them(tag: str) -> None:
    assert check_language(tag) == tag


@pytest.mark.parametrize(
    ("code", "tag"),
    [
        ("EN", "en"), ("deu", "de"), ("ger", "de"), ("eng", "en"), ("zho", "zh"), ("pt_br", "pt-BR"), ("PT-br", "pt-BR"), ("zh-hant-tw", "zh-Hant-TW"),
        ("iw", "he"), ("in", "id"), ("mo", "ro"), ("HSB", "hsb"), ("eng_Latn", "en"), ("zho_Hant", "zh-Hant"), ("ukr_Cyrl", "uk"), ("zh-yue", "yue"),
    ],
)  # fmt: skip
def test_other_ways_to_write_them_are_normalised(code: str, tag: str) -> None:
    assert language_tag(code) == tag


@pytest.mark.parametrize(
    ("code", "nearest"),
    [
        ("german", "de"), ("German", "de"), ("Deutsch", "de"), ("germn", "de"), ("English", "en"), ("upper sorbian", "hsb"), ("Upper_Sorbian", "hsb"),
        ("cebuano", "ceb"), ("Cantonese", "yue"), ("greek", "el"), ("portugese", "pt"), ("\u4e2d\u6587", "zh"), ("gb", "en"), ("us", "en"), ("cz", "cs"),
        ("jp", "ja"), ("cn", "zh"), ("dk", "da"), ("xx-DE", "de"), ("de-", "de"), ("en\n", "en"), (" fr", "fr"), ("de_DE.UTF-8", "de"), ("zh-CHT", "zh-Hant"),
        ("xx", None), ("x", None), ("", None), ("-", None), ("xyz", None), ("12", None), ("a b c", None), ("qwertz", None),
    ],
)  # fmt: skip
def test_unknown_ones_name_what_is_near_and_nothing_else(code: str, nearest: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        check_language(code, "data.source_language")
    message = str(caught.value)
    assert message.startswith(f"data.source_language: {json.dumps(code, ensure_ascii=False)} is no language that is known: ") and "\n" not in message
    assert (f'did you mean "{nearest}"?' in message) if nearest else ("did you mean" not in message)
    assert '"hsb"' in message and '"pt-BR"' in message
    if nearest:
        assert language_tag(nearest) == nearest


def data(**values: object) -> DataConfig:
    return DataConfig.model_validate_json(json.dumps(values))


def test_own_data_has_no_language_unless_it_is_given() -> None:
    assert data(**FILES).languages is None
    assert data(**FILES, target_language="und").languages is None
    assert data(**FILES, target_language="FR").languages == {"source": None, "target": "fr"}
    with pytest.raises(ValueError, match="target_language"):
        data(**FILES, target_language="")


def test_the_phrasebook_is_english_german() -> None:
    assert data(embedded="phrasebook").languages == data(embedded="phrasebook", target_language="deu").languages == {"source": "en", "target": "de"}
    with pytest.raises(ValueError, match="phrasebook is English-German"):
        data(embedded="phrasebook", target_language="fr")


def test_runs_from_before_resume() -> None:
    """Keys that were left out were "en" and "de" once, in the configuration that the run kept."""
    now = json.loads(TrainConfig.model_validate({"data": FILES}).model_dump_json())
    before = json.loads(json.dumps(now))
    before["data"] |= {"source_language": "en", "target_language": "de"}
    assert changed_keys(TrainConfig, before, now, by_content=False) == []
    before["data"]["target_language"] = "fr"
    assert changed_keys(TrainConfig, before, now, by_content=False) == ["data.target_language"]


def test_the_registry_is_read_only_where_a_language_is_checked() -> None:
    code = "import sys; from cvmk.config import DataConfig; print('langcodes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1] == "False"
