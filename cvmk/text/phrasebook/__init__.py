"""The embedded English-German phrasebook: training data that needs no file."""

from cvmk.text.phrasebook.pairs import LARGEST, Phrasebook, phrasebook

__all__ = ["LARGEST", "Phrasebook", "phrasebook"]
