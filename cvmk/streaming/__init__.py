"""Translation of text that is still being written: when to read on, what to say, and what to take back."""

from __future__ import annotations

from cvmk.streaming.core import StreamCore, Update, Wanted
from cvmk.streaming.policy import LocalAgreement, Policy, Retranslation, View, WaitK, Write
from cvmk.streaming.sentences import Sentences
from cvmk.streaming.stream import Stream

__all__ = ["LocalAgreement", "Policy", "Retranslation", "Sentences", "Stream", "StreamCore", "Update", "View", "WaitK", "Wanted", "Write"]
