"""Languages of real sentences among those served, and when a session decides."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from cvmk.errors import ConfigError
from cvmk.serving import detection
from cvmk.serving.answers import Language
from cvmk.serving.detection import Detector, Sticky
from cvmk.serving.errors import ServiceError, Status

SENTENCES = {
    "en": "Two young men are walking down the street with their dogs.",
    "de": "Zwei junge Männer gehen mit ihren Hunden die Straße hinunter.",
    "fr": "Deux jeunes hommes marchent dans la rue avec leurs chiens.",
    "cs": "Dva mladí muži jdou po ulici se svými psy.",
    "pt-BR": "Dois jovens estão andando pela rua com seus cachorros.",
    "nb": "To unge menn går nedover gaten med hundene sine.",
    "zh-Hant": "兩個年輕人帶著他們的狗走在街上。",
    "ja": "二人の若い男性が犬を連れて通りを歩いています。",
    "ru": "Двое молодых людей идут по улице со своими собаками.",
    "fil": "Dalawang binata ang naglalakad sa kalye kasama ang kanilang mga aso.",
}


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(SENTENCES)


@pytest.mark.parametrize("code", SENTENCES)
def test_sentences_of_the_served_languages(detector: Detector, code: str) -> None:
    found = detector.rank(SENTENCES[code])
    assert found[0].code == code and found[0].probability > 0.9
    assert {language.code for language in found} == set(SENTENCES) and sum(language.probability for language in found) == pytest.approx(1)
    assert [language.probability for language in found] == sorted((language.probability for language in found), reverse=True)


def test_only_served_languages_are_found() -> None:
    assert {language.code for language in Detector(["de", "en"]).rank(SENTENCES["fr"])} == {"de", "en"}
    assert Detector(["de", "en"]).rank("Hund")[0].code == "de"  # one word, among two languages
    detector = Detector(SENTENCES)  # which is not restricted to the two
    assert detector.rank(SENTENCES["fr"])[0].code == "fr"


@pytest.mark.parametrize("text", ["", "   ", "12 345", "😀😀", "\u202e", "?!"])
def test_a_text_without_letters_is_of_none(detector: Detector, text: str) -> None:
    assert [language.probability for language in detector.rank(text)] == pytest.approx([1 / len(SENTENCES)] * len(SENTENCES))


def test_any_text_has_an_answer(detector: Detector) -> None:
    for text in ("a\u0301" * 10_000, "x" * 1_000_000, "\ud800 abc", "\0", "ﷺ" * 50):
        assert sum(language.probability for language in detector.rank(text)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("served", "text", "code"),
    [
        (["zh-Hans", "zh-Hant", "en"], "这是一个简体中文的句子", "zh-Hans"),
        (["zh-Hans", "zh-Hant", "en"], "這是一個繁體中文的句子", "zh-Hant"),
        (["zh", "zh-TW", "en"], "這是一個繁體中文的句子", "zh-TW"),
        (["sr-Latn", "sr", "en"], "Два младића шетају улицом са својим псима.", "sr"),
        (["sr-Latn", "sr", "en"], "Dva mladića šetaju ulicom sa svojim psima.", "sr-Latn"),
        (["pt-PT", "pt-BR", "en"], SENTENCES["pt-BR"], "pt-PT"),  # nothing tells them apart: the first
        (["cmn", "en"], "这是一个简体中文的句子", "cmn"),
        (["zsm", "en"], "Dua orang pemuda sedang berjalan di jalan bersama anjing mereka.", "zsm"),
    ],
)
def test_tags_of_one_language(served: list[str], text: str, code: str) -> None:
    found = Detector(served).rank(text)
    assert found[0].code == code and found[0].probability > 0.9


def test_a_language_that_the_detector_does_not_know_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    detector = Detector(["hsb", "de", "en"])
    assert [language.code for language in detector.rank(SENTENCES["de"])] == ["de", "en"]
    assert "hsb are never detected" in caplog.text and len(caplog.records) == 1
    with pytest.raises(ServiceError, match="name it") as error:
        Detector(["hsb", "dsb"]).rank("Dobry źeń")
    assert error.value.status is Status.INVALID_ARGUMENT and error.value.field == "source"


def test_one_language_needs_no_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "_identifier", lambda: pytest.fail("loaded"))
    detector = Detector(["hsb"])
    assert detector.loaded and detector.rank("any") == [Language("hsb", 1.0)]
    detector.load()


def test_one_language_is_known_before_a_word_is() -> None:
    """A stream is translated from its first word on where there is nothing to find out."""
    session = Sticky(Detector(["en"]))
    assert session.read("a") == Language("en", 1.0)


def test_it_is_loaded_when_it_is_first_asked() -> None:
    code = (
        "import sys, cvmk.serving.detection as d; x = d.Detector(['en', 'de']); assert not x.loaded and 'py3langid' not in sys.modules;"
        "x.rank('Haus'); assert x.loaded and 'py3langid' in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_threads_load_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, made = detection._identifier(), []
    monkeypatch.setattr(detection, "_identifier", lambda: made.append(1) or whole)
    detector = Detector(["en", "de"])
    threads = [threading.Thread(target=detector.load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    detection._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ConfigError, match="pip install"):
        Detector(["en", "de"]).rank("Haus")


# a session


class Scripted(Detector):
    """Says what the test says."""

    def __init__(self, code: str, probability: float) -> None:
        super().__init__(["en", "de", "fr"])
        self.says, self.asked = Language(code, probability), 0

    def rank(self, text: str) -> list[Language]:
        self.asked += 1
        return [self.says]


@pytest.mark.parametrize(
    ("text", "decided"),
    [
        ("", False),
        ("ein", False),
        ("ein Haus", False),
        ("ein Haus 12 34 !!", False),  # numbers are no words
        ("ein Haus am", True),
        ("elf Zeichen!", False),
        ("Zwölfzeichen", True),
        ("                        ", False),
        ("你好", False),
        ("你好世界再见", True),
        ("สวัสดีครับ", True),
        ("Да", False),
    ],
)
def test_when_it_is_decided(text: str, decided: bool) -> None:
    sticky = Sticky(Scripted("de", 0.5))
    assert (sticky.read(text) is not None) == (sticky.language is not None) == decided


def test_it_stays_unless_another_is_sure_over_five_words() -> None:
    scripted = Scripted("de", 0.6)
    sticky = Sticky(scripted)
    assert sticky.read("eins zwei drei") == Language("de", 0.6)
    for probability, text, code in (
        (0.99, "one two three four", "de"),
        (0.9, "one two three four five", "de"),
        (0.91, "one two three four 5", "de"),
        (0.91, "one two three four five", "en"),
        (0.91, "one", "en"),
    ):
        scripted.says = Language("en", probability)
        language = sticky.read(text)
        assert language is not None and language.code == code == sticky.language.code  # type: ignore[union-attr]


def test_a_short_sentence_that_has_ended_goes_by_the_best_guess_and_binds_nothing() -> None:
    scripted = Scripted("fr", 0.4)
    sticky = Sticky(scripted)
    assert sticky.read("Oui.") is None and sticky.read("Oui.", final=True) == Language("fr", 0.4) and sticky.language is None
    scripted.says = Language("en", 0.7)
    assert sticky.read("and what follows") == Language("en", 0.7)


def test_what_the_client_says_goes() -> None:
    scripted = Scripted("fr", 1.0)
    sticky = Sticky(scripted, "de")
    assert sticky.read("un deux trois quatre cinq six") == Language("de", 1.0) and scripted.asked == 0
    sticky = Sticky(scripted)
    sticky.read("un deux trois")
    sticky.override("en")
    assert sticky.read("un deux trois quatre cinq six", final=True) == Language("en", 1.0) == sticky.language


def test_a_session_in_one_language_word_by_word(detector: Detector) -> None:
    for code, sentence in SENTENCES.items():
        sticky, text, said = Sticky(detector), "", []
        for word in sentence.split(" "):
            text += word + " "
            said.append(sticky.read(text))
        assert said[-1] is not None and said[-1].code == code
        assert said[0] is None or len(said) == 1
    sticky = Sticky(detector)
    for code in ("de", "en"):  # another one goes on
        assert sticky.read(SENTENCES[code]).code == code  # type: ignore[union-attr]


def test_a_change_costs_no_rank_of_short_text() -> None:
    scripted = Scripted("de", 0.9)
    sticky = Sticky(scripted, None)
    sticky.read("eins zwei drei")
    sticky.read("eins zwei drei vier")
    assert scripted.asked == 1
