"""Our own dialect (``mrgptq``): the tensors of compressed-tensors under a configuration that can say everything a recipe can, such as activation scales by "mse".

`mrgptq evaluate` and ``mrgptq.hf.load_quantized`` run it. No stock loader knows the name: transformers warns and leaves the quantised weights
uninitialised.
"""

from collections.abc import Iterable, Mapping
from reprlib import repr as short_repr
from typing import Any, cast

import numpy as np

from ..arrays import located
from ..formats import FORMATS, block_format
from ..result import Activations, QuantizedMatrix
from ..rotations import rotation_of
from . import compressed_tensors
from .fields import stored_matrix, stored_number, stored_scales, table
from .reader import CheckpointReader
from .scheme import Scheme
from .stored_tensor import StoredTensor

QUANT_METHOD = "mrgptq"
ROTATES_BY_LAYER, PADS = True, True
EXPERTS = ""
_PARTS = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", "weight_shape")


def check(scheme: Scheme) -> None:
    """Every scheme can be stored."""


def encode(module: str, matrix: QuantizedMatrix, rotation: int | None) -> dict[str, StoredTensor]:
    """A QuantizedMatrix as the tensors that are stored for ``module``, whatever the checkpoint's rotation: the divisor lies beside MXFP4 too, and the shape beside a padded layer."""
    tensors = compressed_tensors.encode(module, matrix, rotation)
    tensors[f"{module}.weight_global_scale"] = StoredTensor.of(np.array([matrix.tensor_scale], dtype=np.float32))
    if matrix.padding:
        tensors[f"{module}.weight_shape"] = StoredTensor.of(np.array(matrix.shape, dtype=np.int64))
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("_input.weight")}


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config.json as it is."""
    return dict(config)


def config(scheme: Scheme, ignore: list[str], rotations: Mapping[str, int | None]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json; ``ignore`` lists the linear modules left as they are, ``rotations`` the block sizes of those that have another than the scheme's."""
    activations = {"format": scheme.activations, "rule": scheme.activation_rule, "mx_rule": scheme.activation_mx_rule} if scheme.activations else None
    smaller = {"hadamard_block_sizes": dict(rotations)} if rotations else {}
    return {"quant_method": QUANT_METHOD, "format": scheme.format, "group_size": scheme.group_size, "mx_rule": scheme.mx_rule, "hadamard_block_size": scheme.rotation, **smaller, "activations": activations, "ignore": ignore}


def modules(names: Iterable[str]) -> list[str]:
    """The quantised modules among a checkpoint's tensor names."""
    return compressed_tensors.modules(names)


def parts(module: str) -> list[str]:
    """Names of all tensors that ``module`` may have in this dialect."""
    return [f"{module}.{part}" for part in _PARTS]


def decode(reader: CheckpointReader, module: str, quantization_config: Mapping[str, Any]) -> QuantizedMatrix:
    """The QuantizedMatrix of ``module``; ValueError names the tensor or the key that is missing or different."""
    where = f"{reader.path}: {module}"
    format = quantization_config.get("format")
    if not isinstance(format, str) or format not in FORMATS:
        raise ValueError(f"{where}: format is {short_repr(format)}; known: {', '.join(FORMATS)}")
    if quantization_config.get("group_size") != block_format(format).group_size:
        raise ValueError(f"{where}: group_size is {short_repr(quantization_config.get('group_size'))}; {format} has {block_format(format).group_size}")
    codes = stored_matrix(reader, f"{module}.weight_packed", "U8")
    scales = stored_scales(reader, f"{module}.weight_scale", "F8_E4M3" if format == "nvfp4" else "U8", format)
    divisor = stored_number(reader, f"{module}.weight_global_scale")
    if (quantization_config.get("mx_rule") == "four-thirds") != (format == "mxfp4" and divisor == 3):
        raise ValueError(f"{where}: mx_rule is {short_repr(quantization_config.get('mx_rule'))}, but the divisor {divisor:g} says otherwise")
    stored = table(quantization_config.get("activations"), where, "activations")
    if stored and stored.get("format") != format:
        raise ValueError(f"{where}: activations are {short_repr(stored)}; they must be null or a table whose format is that of the weights, {format!r}")
    with located(where):
        activations = None
        if stored:
            tensor_scale = stored_number(reader, f"{module}.input_global_scale") if stored.get("format") == "nvfp4" else None
            mx_rule, rule = (cast(str, stored.get(key)) for key in ("mx_rule", "rule"))  # Activations refuses what is missing
            activations = Activations(format, mx_rule, tensor_scale, rule)
        sizes = table(quantization_config.get("hadamard_block_sizes"), where, "hadamard_block_sizes")
        rotation = rotation_of(sizes.get(module, quantization_config.get("hadamard_block_size")))
        return QuantizedMatrix(format, codes, scales, divisor, rotation, activations, padding=_padding(reader, module, codes.shape))


def _padding(reader: CheckpointReader, module: str, packed: tuple[int, ...]) -> int:
    """How many columns of the codes are zeros behind the layer's own."""
    name = f"{module}.weight_shape"
    if name not in reader:
        return 0
    stored = reader.tensor(name)
    shape = stored.bits.tolist() if stored.dtype == "I64" and stored.shape == (2,) else None
    if shape is None or shape[0] != packed[0] or not 0 < shape[1] <= 2 * packed[1]:
        raise ValueError(f"{reader.path}: {name} is {shape or f'{stored.dtype} of shape {stored.shape}'}; it must be the I64 rows and columns of a layer whose codes are {packed[0]} x {2 * packed[1]}")
    return 2 * packed[1] - shape[1]


def loaders(scheme: Scheme) -> str:
    """What reads such a checkpoint, in sentences."""
    reason = f'; none applies activation scales by "{scheme.activation_rule}"' if scheme.activation_rule != "absmax" else ""
    return (
        f"Runs in mrgptq alone (`mrgptq evaluate`, mrgptq.hf.load_quantized). No other loader knows this dialect{reason}: transformers warns of an unknown quantization type, "
        "leaves the quantised weights uninitialised and answers nonsense."
    )
