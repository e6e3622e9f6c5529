"""The dialect of FP-Quant (``fp_quant``), which QuTLASS kernels run: transformers on a GPU, vLLM on Blackwell. Its layers are W4A4 and rotated.

Source: FP-Quant's model_quant.py and transformers' integrations/fp_quant.py.
"""

from collections.abc import Iterable, Mapping
from reprlib import repr as short_repr
from typing import Any

import numpy as np

from ..arrays import located
from ..result import Activations, QuantizedMatrix
from ..rotations import Identity, Rotation, rotation_of
from .fields import FLOATS, stored_matrix, stored_number, stored_scales
from .reader import CheckpointReader
from .scheme import Scheme
from .stored_tensor import StoredTensor

QUANT_METHOD = "fp_quant"
ROTATES_BY_LAYER, PADS = False, False
EXPERTS = "Experts' layers are packed one by one; neither transformers nor vLLM runs experts in this dialect."
_BLOCK_SIZES = {"nvfp4": (16, 32, 64, 128), "mxfp4": (32, 64, 128)}
_PARTS = ("qweight", "scales", "weight_global_scale", "act_global_scale", "forward_hadamard_matrix", "backward_hadamard_matrix")


def check(scheme: Scheme) -> None:
    """Raise ValueError, with the reason, for a scheme that this dialect cannot store."""
    if scheme.activations is None:
        raise ValueError(f"fp_quant checkpoints are W4A4: their loaders always round the activations; the recipe says W4A16, so ask for activations {scheme.format!r}")
    if scheme.activation_rule != "absmax":
        raise ValueError(
            f'the loaders of fp_quant find activation scales by "absmax"; the recipe asks for "{scheme.activation_rule}", which this writer cannot say: '
            'use activation_rule "absmax" or the dialect "mrgptq"'
        )
    if scheme.rotation is not None and scheme.rotation not in _BLOCK_SIZES[scheme.format]:
        raise ValueError(f"fp_quant stores {scheme.format} rotated by blocks of {', '.join(map(str, _BLOCK_SIZES[scheme.format]))}; the recipe has {scheme.rotation}")
    if scheme.format == "mxfp4" and (scheme.mx_rule, scheme.activation_mx_rule) != ("four-thirds", "four-thirds"):
        raise ValueError(f'fp_quant scales MXFP4 weights and activations by "four-thirds"; the recipe has "{scheme.mx_rule}" and "{scheme.activation_mx_rule}"')


def _block_size(format: str, rotation: int | None) -> int:
    """Size of the stored matrices; an unrotated layer stores the smallest identity that kernels take."""
    return rotation or _BLOCK_SIZES[format][0]


def _online_matrix(format: str, rotation: int | None) -> StoredTensor:
    """The normalised rotation, rounded to bfloat16 as its writers do."""
    k = _block_size(format, rotation)
    matrix = rotation_of(rotation).apply(np.eye(k, dtype=np.float32))
    bits = matrix.view(np.uint32)
    return StoredTensor.from_bits("BF16", ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16))


def encode(module: str, matrix: QuantizedMatrix, rotation: int | None) -> dict[str, StoredTensor]:
    """A QuantizedMatrix as the tensors that are stored for ``module``; ``rotation``, the checkpoint's, is its own."""
    activation_scale = 3.0 if matrix.format == "mxfp4" or matrix.activations is None else matrix.activations.tensor_scale
    if activation_scale is None:
        raise ValueError(f"{module} is W4A4 NVFP4, but its activations have no tensor_scale: calibrate it first, loaders need it")
    online = _online_matrix(matrix.format, matrix.rotation.block_size)
    tensors = (
        StoredTensor.from_bits("U8", matrix.codes),
        StoredTensor.from_bits("U8", matrix.scales),
        StoredTensor.of(np.array([matrix.tensor_scale], dtype=np.float32)),
        StoredTensor.of(np.array([activation_scale], dtype=np.float32)),
        online,
        online,
    )
    return {f"{module}.{part}": tensor for part, tensor in zip(_PARTS, tensors, strict=True)}


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config.json as it is."""
    return dict(config)


def config(scheme: Scheme, ignore: list[str], rotations: Mapping[str, int | None]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json; ``ignore`` lists the linear modules left as they are. ``rotations`` is empty: one block size is all layers'."""
    return {
        "quant_method": QUANT_METHOD,
        "forward_dtype": scheme.format,
        "forward_method": "abs_max",
        "backward_dtype": "bf16",
        "hadamard_group_size": _block_size(scheme.format, scheme.rotation),
        "transform_init": "hadamard" if scheme.rotation else "identity",
        "modules_to_not_convert": ignore,
        "store_master_weights": False,
        "pseudoquantization": False,
    }


def modules(names: Iterable[str]) -> list[str]:
    """The quantised modules among a checkpoint's tensor names."""
    return [name.removesuffix(".qweight") for name in names if name.endswith(".qweight")]


def parts(module: str) -> list[str]:
    """Names of all tensors that ``module`` may have in this dialect."""
    return [f"{module}.{part}" for part in _PARTS]


def decode(reader: CheckpointReader, module: str, quantization_config: Mapping[str, Any]) -> QuantizedMatrix:
    """The QuantizedMatrix of ``module``; ValueError names the tensor or the key that is missing or different."""
    where = f"{reader.path}: {module}"
    format = quantization_config.get("forward_dtype")
    if not isinstance(format, str) or format not in _BLOCK_SIZES:
        raise ValueError(f"{where}: forward_dtype is {short_repr(format)}; known: {', '.join(_BLOCK_SIZES)}")
    codes = stored_matrix(reader, f"{module}.qweight", "U8")
    scales = stored_scales(reader, f"{module}.scales", "U8", format)
    divisor, activation_divisor = (stored_number(reader, f"{module}.{part}") for part in ("weight_global_scale", "act_global_scale"))
    activations = Activations("mxfp4", "four-thirds") if format == "mxfp4" else Activations("nvfp4", tensor_scale=activation_divisor)
    rotation = _rotation(reader.tensor(f"{module}.forward_hadamard_matrix"), 2 * codes.shape[1], where)
    with located(where):
        return QuantizedMatrix(format, codes, scales, divisor, rotation, activations)


def _rotation(stored: StoredTensor, cols: int, where: str) -> Rotation:
    """Identity or Hadamard, whichever the stored matrix is up to its rounding to bfloat16 (half of 2^-8 relative)."""
    k = stored.shape[0] if stored.shape else 0
    if stored.dtype in FLOATS and stored.shape == (k, k) and 2 <= k <= cols and k & (k - 1) == 0:
        matrix = np.asarray(stored, dtype=np.float32)
        for rotation in (Identity(), rotation_of(k)):
            if np.abs(rotation.apply(np.eye(k, dtype=np.float32)) - matrix).max() <= 2.0**-9:
                return rotation
    raise ValueError(f"{where}: forward_hadamard_matrix is neither the identity nor a Sylvester-Hadamard matrix; other rotations are not read")


def loaders(scheme: Scheme) -> str:
    """What reads such a checkpoint, in sentences."""
    turned = "apply the rotation and " if scheme.rotation else ""
    return f"Loads in transformers with fp_quant and QuTLASS on a GPU, and in vLLM on Blackwell; both {turned}round the activations. Nothing runs it on a CPU but `mrgptq evaluate`."
