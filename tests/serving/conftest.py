from served import serve_config
from small_models import make_model, tokenizer

__all__ = ["make_model", "serve_config", "tokenizer"]
