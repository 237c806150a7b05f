"""Translation of text that is still being written: when to read on, what to say, and what to take back."""

from __future__ import annotations

from cvmk.streaming.policy import LocalAgreement, Policy, Retranslation, View, WaitK, Write
from cvmk.streaming.sentences import Sentences
from cvmk.streaming.stream import Stream, Update

__all__ = ["LocalAgreement", "Policy", "Retranslation", "Sentences", "Stream", "Update", "View", "WaitK", "Write"]
