from small_models import make_model, words

__all__ = ["make_model", "words"]
