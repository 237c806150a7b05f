"""Core-sets: what is chosen, from any stream, with memory that does not grow."""

from __future__ import annotations

import collections
import gzip
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvmk.cli import main
from cvmk.errors import ConfigError
from cvmk.text.coreset import UNITS, _Units, choose


def corpus(lines: int, seed: int = 0) -> list[str]:
    """A few frequent sentences and many rare words."""
    random_ = random.Random(seed)
    return [f"the same old sentence {index % 3}" if index % 10 else " ".join(f"rare{random_.randrange(4000)}" for _ in range(6)) for index in range(lines)]


def ngrams(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[at : at + order]) for order in (1, 2, 3) for at in range(len(words) - order + 1)}


def test_coverage_has_what_is_rare_and_random_what_is_frequent() -> None:
    lines = corpus(3000)
    every = set().union(*map(ngrams, lines))
    share = {}
    for kind in ("coverage", "random", "mix"):
        found = choose(lines, 60, kind)
        assert len(found.sentences) == 60 and found.lines == 3000
        assert all(lines[number - 1] == text for number, text in found.sentences) and found.sentences == sorted(set(found.sentences))
        share[kind] = len(set().union(*(ngrams(text) for _, text in found.sentences))) / len(every)
    assert share["coverage"] > 5 * share["random"] and share["random"] < share["mix"] < share["coverage"]
    assert choose(lines, 60, "coverage").distinct == pytest.approx(len(every), rel=0.2)
    assert choose(lines, 60, "random").distinct is None and choose(lines, 60, "random").covered is None


def test_greedy_choice_takes_the_sentence_with_most_new_units() -> None:
    lines = ["a b", "a b c d", "x y z", "c d e", "a", "q"]
    found = choose(lines, 3, "coverage", orders=(1,))
    assert [text for _, text in found.sentences] == ["a b c d", "x y z", "c d e"] and found.distinct == 9
    assert found.covered == pytest.approx(8 / 9)
    assert choose(lines, 6, "coverage", orders=(1,)).covered == 1.0


def test_the_same_seed_chooses_the_same_and_another_one_others() -> None:
    lines = corpus(2000)
    assert choose(lines, 20, seed=3) == choose(iter(lines), 20, seed=3) != choose(lines, 20, seed=4)


def test_random_choice_is_uniform() -> None:
    counts: collections.Counter[int] = collections.Counter()
    for seed in range(2000):
        counts.update(number for number, _ in choose((f"s{i}" for i in range(20)), 5, "random", seed=seed).sentences)
    assert all(420 < counts[number] < 580 for number in range(1, 21))  # 500 each; sd 19


def test_units_keep_the_last_sentence_of_each_and_no_more_than_fit() -> None:
    units = _Units(50, (1,), 0)
    for block in range(40):
        units.add([(10 * block + row, f"often w{10 * block + row}") for row in range(10)])
        assert len(units._last) <= 50
    assert len(units._last) == 50 and 300 < units.estimate() < 550
    for unit, (number, text) in units._last.items():
        assert unit.decode() in text.split() and (unit != b"often" or number == 399)


def test_memory_is_bounded() -> None:
    """A stream that is never held: what is kept are the reservoir, the sampled units' sentences, and a block."""
    kept: list[object] = []

    class Line(str):
        def __del__(self) -> None:
            alive[0] -= 1

    alive = [0]

    def stream() -> Iterator[str]:
        for index in range(20_000):
            alive[0] += 1
            if index % 500 == 499:
                kept.append(alive[0])
            yield Line(f"w{index} w{index + 1} w{index * 7}")

    found = choose(stream(), 10, "mix")
    assert found.lines == 20_000 and max(kept) < 10 + 10 * UNITS + 2 * 512 + 10  # type: ignore[type-var, operator]


def test_few_lines_empty_lines_and_wrong_numbers() -> None:
    assert choose(["", "one", "  "], 5).sentences == [(2, "one")] and choose([], 5).sentences == []
    for options in ({"count": 0}, {"count": 3, "orders": ()}, {"count": 3, "kind": "all"}):
        with pytest.raises(ConfigError, match="must be"):
            choose(["a"], **options)  # type: ignore[arg-type]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with gzip.open(tmp_path / "in.gz", "wt") as file:
        file.write("".join(f"{line}\n" for line in corpus(500)))
    assert main(["coreset", str(tmp_path / "in.gz"), "-o", str(tmp_path / "out"), "--count", "12", "--by", "coverage", "--seed", "2"]) == 0
    assert "12 of 500 sentences; of some" in capsys.readouterr().out
    assert (tmp_path / "out").read_text().splitlines() == [text for _, text in choose(corpus(500), 12, "coverage", seed=2).sentences]
    (tmp_path / "blank").write_text("\n\n")
    (tmp_path / "latin").write_bytes(b"a\n\xe4\n")
    for name, code in (("blank", 5), ("nowhere", 5), ("latin", 5)):
        assert main(["coreset", str(tmp_path / name), "-o", str(tmp_path / "other")]) == code
    assert main(["coreset", str(tmp_path / "in.gz"), "-o", str(tmp_path / "other"), "--seed", "-1"]) == 2
    assert "latin line 2 is not valid UTF-8" in capsys.readouterr().err and not (tmp_path / "other").exists()
