"""A stream says what its policy allows, and never changes what it has committed."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from cvmk.inference import Translator
from cvmk.streaming import LocalAgreement, Policy, Retranslation, Sentences, Stream, Update, WaitK


class _Words:
    """A tokenizer of words."""

    def __init__(self) -> None:
        self.known: list[str] = []

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.known:
                self.known.append(word)
        return [self.known.index(word) for word in text.split()]

    def decode(self, ids: Any) -> str:
        return " ".join(self.known[i] for i in ids)


class _Scripted:
    """A translator that knows the translations of some texts, and goes on from what was committed."""

    def __init__(self, script: dict[str, str], max_length: int = 40) -> None:
        self.script, self.tokenizer, self.engine, self.asked = script, _Words(), SimpleNamespace(max_length=max_length), list[str]()

    def session(self, **options: Any) -> Any:
        def commit(tokens: list[int]) -> None:
            assert tokens[: len(session.committed)] == session.committed
            session.committed = tokens

        def translate() -> Any:
            self.asked.append(session.source)
            tokens = session.committed + self.tokenizer.encode(self.script[session.source])[len(session.committed) :]
            return SimpleNamespace(text=self.tokenizer.decode(tokens), tokens=tokens)

        session = SimpleNamespace(source="", committed=[], commit=commit, translate=translate, close=lambda: None)
        return session


SCRIPT = {"we": "wir", "we need": "wir müssen", "we need a": "wir brauchen ein", "we need a table": "wir brauchen einen Tisch", "Thanks.": "Danke."}


def said(policy: Policy, *parts: str, **options: Any) -> list[tuple[str, str, int]]:
    stream = Stream(_Scripted(SCRIPT), policy, **options)  # type: ignore[arg-type]
    updates = [update for part in parts for update in stream.append(part)] + stream.close()
    assert [update.revision for update in updates] == list(range(1, len(updates) + 1)) and updates[-1].final
    return [(update.committed, update.tentative, update.deleted) for update in updates]


PARTS = ("we ", "need ", "a ", "table")


def test_retranslation() -> None:
    assert said(Retranslation(0), *PARTS) == [
        ("", "wir", 0),
        ("", "wir müssen", 0),
        ("", "wir brauchen ein", 6),
        ("wir brauchen einen Tisch", "", 0),
    ]
    assert said(Retranslation(1), *PARTS) == [("", "wir", 0), ("", "wir brauchen", 0), ("wir brauchen einen Tisch", "", 0)]


def test_local_agreement() -> None:
    assert said(LocalAgreement(2), *PARTS) == [("", "wir", 0), ("wir", " müssen", 0), ("", " brauchen ein", 6), (" brauchen einen Tisch", "", 0)]
    assert said(LocalAgreement(1), *PARTS[:2]) == [("wir", "", 0), (" müssen", "", 0), ("", "", 0)]


def test_a_character_whose_other_bytes_may_come_is_not_committed() -> None:
    script = {"we": "wir \ufffd", "we need": "wir é"}
    stream = Stream(_Scripted(script), LocalAgreement(1))  # type: ignore[arg-type]
    updates = stream.append("we ") + stream.append("need") + stream.close()
    assert [(update.committed, update.tentative) for update in updates] == [("wir", " \ufffd"), (" é", "")]


def test_wait_k() -> None:
    assert said(WaitK(2), *PARTS) == [("wir", "", 0), (" brauchen", "", 0), (" einen Tisch", "", 0)]
    assert said(WaitK(9), *PARTS) == [("wir brauchen einen Tisch", "", 0)]


def test_the_end_of_what_was_read_ends_no_sentence() -> None:
    stream = Stream(_Scripted({"we": "wir.", "we need": "wir brauchen …", "we need.": "wir brauchen."}), LocalAgreement(1))  # type: ignore[arg-type]
    assert [(u.committed, u.tentative) for u in [*stream.append("we "), *stream.append("need ")]] == [("", "wir"), ("wir brauchen", "")]


def test_unfinished_words_are_waited_for() -> None:
    assert said(Retranslation(0), "w", "e ne", "ed a") == said(Retranslation(0), "we ", "need ", "a")
    script = _Scripted({"w": "W", "we": "wir"})
    stream = Stream(script, Retranslation(0), whole_words=False)  # type: ignore[arg-type]
    assert [update.tentative for part in "we" for update in stream.append(part)] == ["W", "wir"]


def test_sentences_follow_one_another() -> None:
    stream = Stream(_Scripted(SCRIPT | {"we need a table.": "wir brauchen einen Tisch."}), LocalAgreement())  # type: ignore[arg-type]
    updates = stream.append("we need a table. Thanks. We")
    assert [(u.segment, u.committed, u.final, u.source_read) for u in updates] == [(0, "wir brauchen einen Tisch.", True, 16), (1, "Danke.", True, 24)]
    assert stream.source == "We"


def test_nothing_new_asks_for_nothing() -> None:
    translator = _Scripted(SCRIPT | {"we  need": "wir müssen"})
    stream = Stream(translator, Retranslation(0))  # type: ignore[arg-type]
    for part in ("we ", "", " ", "nee", "d"):
        stream.append(part)
    assert translator.asked == ["we"]
    assert [update.final for update in stream.end_segment()] == [True] and translator.asked == ["we", "we  need"]
    assert stream.end_segment() == [] and len(translator.asked) == 2


def test_replacing() -> None:
    stream = Stream(_Scripted(SCRIPT | {"we want": "wir wollen"}), LocalAgreement(2))  # type: ignore[arg-type]
    assert [(u.committed, u.tentative) for u in stream.append("we want ")] == [("", "wir wollen")]
    assert [(u.committed, u.tentative, u.deleted) for u in stream.replace(3, "need a ")] == [("wir", " brauchen ein", 6)]
    for begin in (-1, 99):
        with pytest.raises(ValueError, match="cannot be replaced"):
            stream.replace(begin, "x")
    assert stream.source == "we need a "


def test_a_closed_stream_says_so() -> None:
    with Stream(_Scripted(SCRIPT)) as stream:  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="grows by strings"):
            stream.append(b"we")  # type: ignore[arg-type]
        assert stream.close() == []
    assert stream.close() == []
    for use in (lambda: stream.append("a"), lambda: stream.replace(0, "a"), stream.end_segment):
        with pytest.raises(RuntimeError, match="closed"):
            use()


class Reader:
    """Whoever looks on: what stands before them after each update."""

    def __init__(self) -> None:
        self.committed: dict[int, str] = {}
        self.tentative, self.segment, self.revision, self.read = "", 0, 0, 0

    def take(self, update: Update) -> None:
        assert update.revision > self.revision and update.segment >= self.segment
        before = self.committed.get(update.segment, "") + (self.tentative if update.segment == self.segment else "")
        self.committed[update.segment] = self.committed.get(update.segment, "") + update.committed
        now = self.committed[update.segment] + update.tentative
        kept = before[: len(before) - update.deleted]
        assert now.startswith(kept) and (not update.deleted or not now.startswith(before[: len(kept) + 1]))
        assert not update.final or not update.tentative
        self.tentative, self.segment, self.revision, self.read = update.tentative, update.segment, update.revision, update.source_read


@pytest.mark.parametrize("of", [Translator.from_model, Translator.of_weights], ids=["torch", "native"])
@pytest.mark.parametrize("policy", [Retranslation(0), Retranslation(3), LocalAgreement(), LocalAgreement(3, 1), WaitK(1), WaitK(4)], ids=str)
@pytest.mark.parametrize("direction", ["both", "causal"])
def test_any_text_in_any_pieces(make_model, tokenizer, of: Any, policy: Policy, direction: str) -> None:
    options = {"encoder_direction": "causal"} if direction == "causal" else {}
    translator = of(make_model(tokenizer.vocab_size, sharpness=3.0, seed=5, **options), tokenizer)
    for seed in range(2):
        generator = random.Random(seed)
        text = "".join(generator.choice(["ab", " ", " ", "c", "def ", ". A", "! ", "你", "g", "hi, "]) for _ in range(40))
        reader, stream, at = Reader(), Stream(translator, policy), 0
        while at < len(text):
            step = generator.randint(1, 9)
            for update in stream.append(text[at : at + step]):
                reader.take(update)
            at += step
        for update in stream.close():
            reader.take(update)
        assert not reader.tentative
        if isinstance(policy, Retranslation):
            whole = Stream(translator, policy)
            assert reader.committed == {update.segment: update.committed for update in [*whole.append(text), *whole.close()]}


def test_what_retranslation_commits_is_the_translation_of_the_sentence(make_model, tokenizer) -> None:
    translator = Translator.of_weights(make_model(tokenizer.vocab_size, sharpness=3.0), tokenizer)
    stream = Stream(translator, beam_size=3)
    updates = [update for part in ("ab c", "d. E", "f gh! Abc") for update in stream.append(part)] + stream.close()
    assert [update.committed for update in updates if update.final] == [found.text for found in translator.translate(["ab cd.", "Ef gh!", "Abc"], beam_size=3)]


def test_sentences_that_are_too_long_are_cut(make_model, tokenizer) -> None:
    translator = Translator.of_weights(make_model(tokenizer.vocab_size), tokenizer)
    for policy in (Retranslation(), LocalAgreement(1), WaitK(1)):
        for text in ("ab " * 300, "a" * 2000, "ab, " * 200, "你" * 300):
            reader, stream = Reader(), Stream(translator, policy)
            for update in [*stream.append(text[: len(text) // 2]), *stream.append(text[len(text) // 2 :]), *stream.close()]:
                reader.take(update)
            assert reader.read >= len(text.rstrip()) and len(reader.committed) > 1


def test_the_language_decides_where_sentences_end() -> None:
    script = {"Am 3. Mai.": "On May 3rd.", "Am 3.": "On the 3rd.", "Mai.": "May."}
    for language, expected in (("de", ["On May 3rd."]), ("en", ["On the 3rd.", "May."])):
        stream = Stream(_Scripted(script), WaitK(50), sentences=Sentences(language))  # type: ignore[arg-type]
        assert [update.committed for update in stream.append("Am 3. Mai.") + stream.close()] == expected
