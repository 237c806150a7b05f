from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvmk.validation import scripts


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Käse, 5 µm² und 4.5", ["k", "se", "5", "m", "und", "4", "5"]),  # as ROUGE's script has it
        ("Привет, мир!", ["привет", "мир"]),
        ("ΚΑΛΗΜΕΡΑ ΣΑΣ;", ["καλημερα", "σας"]),
        ("हिन्दी में पाठ।", ["हिन्दी", "में", "पाठ"]),
        ("السلام عليكم، كيف الحال؟", ["السلام", "عليكم", "كيف", "الحال"]),
        ("می\u200cخواهم", ["میخواهم"]),
        ("안녕하세요, 세계.", ["안녕하세요", "세계"]),
        ("朝に本を3冊買う。", ["朝", "に", "本", "を", "3", "冊", "買", "う"]),
        ("กินข้าว", ["กิ", "น", "ข้", "า", "ว"]),
        ("བོད་སྐད།", ["བོད", "སྐད"]),
        ("Ａ１", ["ａ１"]),
        ("二〇二六年", ["二", "〇", "二", "六", "年"]),
        ("… — !", []),
        ("", []),
    ],
)
def test_words(line, words):
    assert scripts.words(line) == words


@given(st.text(st.characters(max_codepoint=0x24F), max_size=40))
def test_latin_words_are_those_of_rouge(line):
    assert scripts.words(line) == re.findall("[a-z0-9]+", line.lower())


@pytest.mark.parametrize("text", ["くだらない ガラス", "각하 안녕", "Ёжик и чай", "ম্যাচ"])
def test_composed_and_decomposed_text_has_the_same_words(text):
    assert scripts.words(unicodedata.normalize("NFD", text)) == scripts.words(unicodedata.normalize("NFC", text)) != []


@pytest.mark.parametrize(
    ("text", "latin"),
    [("Größe: 5 m", True), ("α-Strahlung", True), ("", True), ("123 !", True), ("Ёлка", False), ("こんにちは", False), ("iPhoneを二台買いました", False)],
)
def test_is_latin(text, latin):
    assert scripts.is_latin(text) is latin


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["朝に私は歌を買います。"], "ja"),
        (["カタカナ"], "ja"),
        (["我今天买了一本书。", "她说「さようなら」，然后就离开了这座城市，再也没有回来过，我们都很想念她，希望她一切都好。"], "zh"),
        (["สวัสดีครับ"], "other"),
        (["សួស្តី", "ສະບາຍດີ", "မင်္ဂလာပါ"], "other"),
        (["Guten Tag", "東京"], None),
        (["안녕하세요 세계"], None),
        (["..."], None),
        ([], None),
    ],
)
def test_unspaced_language(texts, language):
    assert scripts.unspaced_language(texts) == language
