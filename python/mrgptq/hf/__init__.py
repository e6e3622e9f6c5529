"""Models of transformers: calibration block by block, perplexity, running a quantised checkpoint and text from it. The only folder that imports torch."""

from .calibrate import calibrate
from .evaluate import divergence, evaluation_bytes, perplexity, tempered_perplexities, window_divergences
from .fisher import collect_output_hessians
from .generate import Generated, generate
from .linear import PackedLinear
from .model import cpu_capability, load_model, load_quantized, load_tokenizer, token_windows, use_threads
from .observe import collect_hessians, layer_weights, observe_hessians
from .streamed import StreamedBlocks, load_streamed
from .walk import OpenBlock, walk

__all__ = ["Generated", "OpenBlock", "PackedLinear", "StreamedBlocks", "calibrate", "collect_hessians", "collect_output_hessians", "cpu_capability", "divergence", "evaluation_bytes", "generate", "layer_weights", "load_model", "load_quantized", "load_streamed", "load_tokenizer", "observe_hessians", "perplexity", "tempered_perplexities", "token_windows", "use_threads", "walk", "window_divergences"]
