"""mrgptq: language models in four bits (MXFP4, NVFP4) with MR-GPTQ, on a CPU, from numpy arrays or whole checkpoints."""

from importlib.metadata import version as _version

from . import _core
from .activations import quantize_activations, round_activations
from .arrays import default_threads as _default_threads
from .checkpoint import load, load_hessians, merge_hessians, save, save_hessians
from .checkpoint.stored_tensor import StoredTensor
from .codecs import alternating_tensor_scale, nvfp4_tensor_scale, quantize
from .formats import FORMATS, MX_RULES
from .gptq import Factor, Hessian
from .layer import make_factor, quantize_layer, shared_tensor_scale
from .matmul import matmul
from .packing import from_blocked, pack, to_blocked, unpack
from .prepack import PrepackedMatrix, prepack
from .recipe import Recipe
from .result import Activations, LayerReport, QuantizedMatrix
from .rotations import Dense, Hadamard, Identity
from .transforms import transform

__version__ = _version("mrgptq")


def build_info() -> dict[str, object]:
    """What this installation is: version, ISA level in use and those this machine supports, compiler, OpenMP, and the number of threads that ``threads=None`` means in this process."""
    return {"version": __version__, **_core.build_info(), "threads": _default_threads(), "isa_supported": _core.supported_levels()}


__all__ = [
    "FORMATS", "MX_RULES", "Activations", "Dense", "Factor", "Hadamard", "Hessian", "Identity", "LayerReport", "PrepackedMatrix", "QuantizedMatrix", "Recipe", "StoredTensor", "alternating_tensor_scale", "build_info",
    "from_blocked", "load", "load_hessians", "make_factor", "matmul", "merge_hessians", "nvfp4_tensor_scale", "pack", "prepack", "quantize", "quantize_activations", "quantize_layer", "round_activations", "save", "save_hessians", "shared_tensor_scale", "to_blocked", "transform", "unpack",
]
