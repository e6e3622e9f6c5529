"""Models of transformers: calibration block by block, perplexity, running a quantised checkpoint. The only folder that imports torch."""

from .calibrate import calibrate
from .evaluate import perplexity
from .model import load_model, load_quantized, load_tokenizer, token_windows, use_threads

__all__ = ["calibrate", "load_model", "load_quantized", "load_tokenizer", "perplexity", "token_windows", "use_threads"]
