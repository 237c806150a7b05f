"""Text for the metrics: invented sentences with damaged copies, and the Multi30k test set where it is there."""

from __future__ import annotations

import gzip
import os
import random
from pathlib import Path

import pytest

REFERENCES = [
    "Ein alter Mann sitzt auf einer Bank und füttert die Tauben.",
    "Zwei Kinder laufen lachend durch den flachen Bach.",
    "Das Brot kostet 2,50 Euro, der Käse 13,99 Euro.",
    "Der Zug nach München fährt um 10:45 Uhr von Gleis 7-8 ab.",
    'Sie rief: "Wartet auf mich!", aber niemand drehte sich um.',
    "Im Jahr 2019 wohnten hier 1.204.000 Menschen.",
    "Wer hat den Schlüssel gesehen?",
    "Meine Schwester (sie ist Ärztin) arbeitet nachts.",
    "Der Hund bellt, der Hund springt, der Hund schläft.",
    "Bitte biegen Sie an der dritten Ampel links ab.",
    "Die E-Mail-Adresse lautet info@beispiel.de & sie gilt noch.",
    "Es war kalt – sehr kalt – und der See war zugefroren.",
    "Der Wert liegt bei -3,5 %, nicht bei +4 %.",
    "„Guten Morgen“, sagte der Bäcker.",
    "Ein Mädchen in einem roten Kleid hält einen gelben Ballon.",
    "Wir haben 3 Äpfel, 4 Birnen und 12 Eier gekauft.",
    "Das Wetter wird morgen besser als heute.",
    "Er hat's schon wieder vergessen ...",
    "Die Straße ist wegen Bauarbeiten gesperrt; nehmen Sie die Brücke.",
    "Nein.",
    "Ja!",
    "Auf dem Markt verkaufen drei Frauen frischen Fisch und Gemüse aus der Umgebung.",
    "Tom's Haus steht neben der Kirche.",
    "Die Datei heißt bericht_v2.1.txt und hat 4,096 Bytes.",
    "Unter dem Tisch liegt eine Katze, auf dem Tisch liegt eine Katze, überall liegt eine Katze.",
    "Der Preis stieg von $5 auf $7.25.",
    "Ich möchte ein Zimmer für zwei Nächte, bitte.",
    "Fünf Musiker spielen vor einem großen Publikum auf einer kleinen Bühne im Park.",
    "Das Formular A/B-12 muss bis 31.12. abgegeben werden.",
    "Kannst du mir helfen, den schweren Koffer in den ersten Stock zu tragen?",
    "Sein Großvater erzählt gern von früher.",
    "Die Lehrerin schreibt eine lange Gleichung an die Tafel: x = y * 2 + [z - 1].",
    "Nachdem der Regen aufgehört hatte, gingen wir noch einmal zum Hafen hinunter, um die Schiffe zu sehen, die am Abend auslaufen sollten.",
    "Ein Radfahrer überholt einen Bus.",
    "Das Kind weint, weil sein Eis in den Sand gefallen ist.",
    "Um Mitternacht läuten die Glocken der alten Kirche zwölfmal.",
    "Der Koch schneidet Zwiebeln, ohne zu weinen.",
    "Heute gibt es Suppe; morgen gibt es, wie immer am Freitag, Fisch mit Kartoffeln.",
    "Am Ende des Weges steht ein Schild: <Betreten verboten>.",
    "Alles Gute zum Geburtstag, liebe Anna!",
]


def damage(references: list[str], seed: int, strength: float = 0.2) -> list[str]:
    """Copies with words dropped, doubled, replaced and blocks moved; `strength` is the share of words touched."""
    generator = random.Random(seed)
    words_of_all = [word for reference in references for word in reference.split()]
    damaged = []
    for reference in references:
        words = reference.split()
        if len(words) > 3 and generator.random() < 3 * strength:
            start, length = generator.randrange(len(words) - 1), generator.randint(1, 4)
            block = words[start : start + length]
            del words[start : start + length]
            place = generator.randint(0, len(words))
            words[place:place] = block
        kept = []
        for word in words:
            chance = generator.random()
            if chance < strength / 3:
                continue
            kept.append(generator.choice(words_of_all) if chance < 2 * strength / 3 else word)
            if chance > 1 - strength / 3:
                kept.append(word.upper())
        damaged.append(" ".join(kept))
    return damaged


@pytest.fixture(scope="session")
def references() -> list[str]:
    return REFERENCES


@pytest.fixture(scope="session")
def hypotheses() -> list[str]:
    """A damaged copy of `references` in which one line is empty."""
    damaged = damage(REFERENCES, seed=1)
    damaged[19] = ""
    return damaged


@pytest.fixture(scope="session")
def worse_hypotheses() -> list[str]:
    return damage(REFERENCES, seed=2, strength=0.5)


@pytest.fixture(scope="session")
def damaged():
    """The function `damage`."""
    return damage


@pytest.fixture(scope="session")
def multi30k() -> tuple[list[str], list[str]]:
    """German references of the Multi30k test set of 2016, and damaged copies."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data" / "multi30k"
    file = Path(os.environ.get("CVMK_MULTI30K", default)) / "test_2016_flickr.de.gz"
    if not file.exists():
        pytest.skip(f"Multi30k is not at {file.parent}: set CVMK_MULTI30K to its folder")
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").rstrip("\n").split("\n")
    return damage(lines, seed=3), lines
