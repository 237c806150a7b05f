"""Translation with a finished model: the Translator, its engines, and models on disk. torch is imported by the torch engine only."""

from cvmk.inference.model_folder import load_model_folder, save_model_folder
from cvmk.inference.translator import TooLongError, Translation, TranslationHypothesis, Translator

__all__ = ["TooLongError", "Translation", "TranslationHypothesis", "Translator", "load_model_folder", "save_model_folder"]
