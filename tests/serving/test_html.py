"""HTML is translated between its tags and kept whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvmk.serving.html import Document
from cvmk.serving.html_tokens import Kind, characters, tokens
from cvmk.serving.passages import pieces
from cvmk.streaming import Sentences

TAGS = """<b>|</b>|<i class='x>y'>|</i>|<p>|</p>|<br/>|<br>|<img src=a.png alt="Ein > Bild">|<code>|</code>|<!-- Hello. -->|<script>if (a < b) 'Hello.'</script>
<style>p { color: red }</style>|<span translate=no>|</span>|<div class='notranslate'>|</div>|<a href="?a=1&amp;b=2">|</a>|<!DOCTYPE html>|<title>|</title>|<|</
<!|<?|<a b='|</scr|<textarea>|</textarea>|<svg/>|<![CDATA[x]]>""".replace("\n", "|").split("|")
TEXTS = [*"Hello| world|. |。|! |A red car|&amp;|&nbsp;|&notit;|&#x41;|&#0;|&unknown;|e.g. |3. |ß|日本語|>".split("|"), "\n", "\n\n  ", '"', "\r\n", "\t"]
documents = st.lists(st.sampled_from(TAGS + TEXTS) | st.text(max_size=4), max_size=24).map("".join)


def translate(whole: Document, say: Callable[[str], str]) -> str:
    """With every text said that is wanted, which ends."""
    known: dict[str, str] = {}
    for _ in range(4):
        if not (wanted := list(whole.wanted(known))):
            return whole.render(known)
        known |= {text: say(text) for text in wanted}
    raise AssertionError("texts are wanted again and again")


def from_table(table: Mapping[str, str]) -> Callable[[str], str]:
    return lambda text: table[text]


@given(documents)
def test_unchanged_texts_leave_the_document_as_it_is(document: str) -> None:
    assert translate(Document(document), lambda text: text) == document


@given(documents)
def test_changed_texts_leave_every_tag(document: str) -> None:
    """Tags as often as before, in whatever order; what is no text stays."""
    before = [token.raw for token in tokens(document) if token.kind is not Kind.TEXT]
    after = translate(Document(document), lambda text: text.swapcase() + "<&>" if text.isascii() else text[::-1])
    assert sorted(token.raw for token in tokens(after) if token.kind is not Kind.TEXT) == sorted(before)


@given(documents)
def test_tokens_are_the_document(document: str) -> None:
    assert "".join(token.raw for token in tokens(document)) == document
    assert "".join(raw for _, raw in characters(document)) == document


@given(st.text(max_size=200), st.sampled_from(["", "de"]))
def test_pieces_are_the_text(text: str, language: str) -> None:
    found = pieces(text, Sentences(language))
    assert [piece.begin for piece in found] == [0, *(piece.end for piece in found)][: len(found)] and (not found or found[-1].end == len(text))
    assert all(text[piece.begin : piece.end].strip() == text[piece.begin : piece.end] for piece in found if piece.is_sentence)
    assert all(piece.is_sentence for piece in found if any(map(str.isalpha, text[piece.begin : piece.end])))


def test_tokens_are_those_of_the_standard_library() -> None:
    document = """<!DOCTYPE html><html lang=en><head><title>A &amp; B</title><script>if (a<b) {"</p>"}</script></head>
    <body class="x > y" data-a='1' hidden><p id=1>One <b>two</b><br>three<img src="a" alt=''/> &lt;four&gt;</p><!-- <p>five</p> --></BODY></html>"""
    seen: list[tuple[str, str, dict[str, str]]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append(("OPEN", tag, {name: value or "" for name, value in attrs}))

        def handle_endtag(self, tag: str) -> None:
            seen.append(("CLOSE", tag, {}))

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.handle_starttag(tag, attrs)

    Parser().feed(document)
    assert [(token.kind.name, token.tag, dict(token.attributes)) for token in tokens(document) if token.kind in (Kind.OPEN, Kind.CLOSE)] == seen


@pytest.mark.parametrize("part", "<!--|<a |<|&|<a b='|<![CDATA[|</|<script>|<textarea>x|<b>|<a a=|&a|a. |1. |A. |<b>a |x |。|</b>a|<code>".split("|"))
def test_time_is_linear(part: str) -> None:
    """The parser of the standard library takes 20 s for one of these."""
    document = part * (65_536 // len(part))
    begin = time.process_time()
    whole = Document(document, Sentences("de"))
    known: dict[str, str] = {}
    for _ in range(3):
        known |= {text: text.upper() for text in whole.wanted(known)}
    whole.render(known)
    assert time.process_time() - begin < 3


RED = {
    "We saw a red car.": "Wir sahen ein rotes Auto.",
    "red": "rotes",
    "red car": "rotes Auto",
    "The red car stopped.": "Das rote Auto hielt.",
    "It stopped.": "Es hielt.",
}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("<p>We saw a red car.</p>", "<p>Wir sahen ein rotes Auto.</p>"),
        ("<p>We saw a <b>red</b> car.</p>", "<p>Wir sahen ein <b>rotes</b> Auto.</p>"),
        ("<p>We saw a <a href='x'><b>red</b> car</a>.</p>", "<p>Wir sahen ein <a href='x'><b>rotes</b> Auto</a>.</p>"),
        ("<b>We saw a red car.</b> It stopped.", "<b>Wir sahen ein rotes Auto.</b> Es hielt."),
        ("<b>We saw a red car. It stopped.</b>", "<b>Wir sahen ein rotes Auto. Es hielt.</b>"),
        ("<ul>\n  <li>It\n  stopped.\n  <li>It stopped.</ul>", "<ul>\n  <li>Es hielt.\n  <li>Es hielt.</ul>"),
        ("It stopped.<br>It stopped.", "Es hielt.<br>Es hielt."),
        ("It stopped. <code>It stopped.</code>", "Es hielt. <code>It stopped.</code>"),
        ("<p translate=no>It stopped.</p><p>It stopped.</p>", "<p translate=no>It stopped.</p><p>Es hielt.</p>"),
        ("<img alt='It stopped.'>It stopped.<!-- It stopped. -->", "<img alt='It stopped.'>Es hielt.<!-- It stopped. -->"),
        ("<title>It stopped.</title><script>'It stopped.'</script>", "<title>Es hielt.</title><script>'It stopped.'</script>"),
        ("It <!-- so -->stopped.", "Es <!-- so -->hielt."),
    ],
)
def test_sentences_with_tags(document: str, expected: str) -> None:
    assert translate(Document(document), from_table(RED)) == expected


def test_an_element_that_moves() -> None:
    table = {"I have seen it today.": "Heute habe ich es gesehen.", "today": "heute", "seen": "gesehen"}
    assert translate(Document("I have <i>seen</i> it <b>today</b>."), from_table(table)) == "<b>Heute</b> habe ich es <i>gesehen</i>."


def test_what_is_kept_within_a_sentence() -> None:
    table = {"Run pip install x now.": "Führe jetzt pip install x aus."}
    assert translate(Document("Run <code>pip <b>install</b> x</code> now."), from_table(table)) == "Führe jetzt <code>pip <b>install</b> x</code> aus."


def test_an_element_with_other_endings() -> None:
    """Alone it gets an article and a full stop, and the ending of another case."""
    table = {
        "A man in a blue shirt stands on a ladder.": "Ein Mann im blauen Hemd steht auf einer Leiter.",
        "blue shirt": "Ein blaues Hemd.",
        "ladder": "Junge Leiter.",
    }
    document = "A man in a <b>blue shirt</b> stands on a <a href=x>ladder</a>."
    assert translate(Document(document), from_table(table)) == "Ein Mann im <b>blauen Hemd</b> steht auf einer <a href=x>Leiter</a>."


def test_an_element_that_is_not_found() -> None:
    """It goes where it was."""
    table = {"We saw a red car.": "Wir sahen ein kirschrotes Auto.", "red": "bunt"}
    assert translate(Document("We saw a <b>red</b> car."), from_table(table)) == "Wir sahen ein <b>kirschrotes</b> Auto."


def test_what_is_kept_and_not_found() -> None:
    """The pieces are translated each by itself, with the white space around them."""
    table = {"Run cvmk x now.": "Jetzt laufen.", "Run": "Führe", "now.": "jetzt aus."}
    assert translate(Document("Run <code>cvmk x</code> now."), from_table(table)) == "Führe <code>cvmk x</code> jetzt aus."


def test_references() -> None:
    assert translate(Document("<p>Fish &amp; chips&hellip;</p>"), from_table({"Fish & chips…": "Fisch & <Pommes>"})) == "<p>Fisch &amp; &lt;Pommes&gt;</p>"
    assert [char for char, _ in characters("&amp;&ampx;&notit;&#65;&#xZ;&x;&NotEqualTilde;")] == list("&&x;¬it;A&#xZ;&x;≂\u0338")


def test_a_space_behind_a_sentence_that_needed_none() -> None:
    table = {"一。": "One.", "二。": "Two."}
    assert translate(Document("一。二。"), from_table(table)) == "One. Two."
    assert translate(Document("<p>一。<b>二。</b>"), from_table(table)) == "<p>One. <b>Two.</b>"


def test_a_sentence_that_never_ends_is_cut() -> None:
    found = pieces("word " * 2000, Sentences())
    assert all(piece.end - piece.begin <= 2000 for piece in found) and len(found) > 4
