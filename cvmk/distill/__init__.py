"""What a student learns from a teacher: logits, hidden states, attention maps; and whether the two fit together."""

from cvmk.distill.layer_map import layer_pairs
from cvmk.distill.objective import DistillationObjective, Losses
from cvmk.distill.vocabulary import check_vocabularies

__all__ = ["DistillationObjective", "Losses", "check_vocabularies", "layer_pairs"]
