from small_models import make_model, tokenizer, words

__all__ = ["make_model", "tokenizer", "words"]
