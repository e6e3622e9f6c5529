"""The dialect of compressed-tensors: formats ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``, which transformers, vLLM and SGLang load.

Source: compressed-tensors 0.20, compressors/nvfp4, compressors/mxfp4 and transform.
"""

from collections.abc import Iterable, Mapping
from reprlib import repr as short_repr
from typing import Any

import numpy as np

from ..arrays import located
from ..formats import block_format
from ..modules import as_pattern
from ..result import Activations, QuantizedMatrix
from ..rotations import rotation_of
from .fields import stored_matrix, stored_number, stored_scales, table
from .reader import CheckpointReader
from .scheme import Scheme
from .stored_tensor import StoredTensor

QUANT_METHOD = "compressed-tensors"
_LIBRARY_VERSION = "0.20.0"  # whose loader these files were tried with
_TRANSFORM = "v"  # the input-side rotation's conventional name; its online matrix is stored as <module>.v_input.weight
ROTATES_BY_LAYER, PADS = True, False
EXPERTS = (
    "Experts' layers are packed one by one, as vLLM and SGLang read them (not tried here). transformers, which puts experts together, leaves them as they were initialised, without an error, and answers nonsense."
)
_FORMAT_NAMES = {"nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}


def check(scheme: Scheme) -> None:
    """Raise ValueError, with the reason, for a scheme that this dialect cannot store."""
    if scheme.mx_rule == "four-thirds":
        raise ValueError('compressed-tensors cannot store MXFP4 scales by "four-thirds": it has no tensor-wide divisor for the factor 1/3; use mx_rule "even" or the dialect fp_quant')
    if scheme.activation_rule != "absmax":
        raise ValueError(
            f'the loaders of compressed-tensors find activation scales by "absmax"; the recipe asks for "{scheme.activation_rule}", which the dialect cannot say: '
            'use activation_rule "absmax" or the dialect "mrgptq"'
        )
    if scheme.activations == "mxfp4" and scheme.activation_mx_rule != "even":
        raise ValueError(f'compressed-tensors rounds MXFP4 activations by "even"; the recipe asks for "{scheme.activation_mx_rule}", which it cannot say')


def encode(module: str, matrix: QuantizedMatrix, rotation: int | None) -> dict[str, StoredTensor]:
    """A QuantizedMatrix as the tensors that are stored for ``module`` of a checkpoint whose rotation is of that block size."""
    tensors = {f"{module}.weight_packed": StoredTensor.from_bits("U8", matrix.codes)}
    if matrix.format == "nvfp4":
        tensors[f"{module}.weight_scale"] = StoredTensor.from_bits("F8_E4M3", matrix.scales)
        tensors[f"{module}.weight_global_scale"] = StoredTensor.of(np.array([matrix.tensor_scale], dtype=np.float32))
        if matrix.activations:
            if matrix.activations.tensor_scale is None:
                raise ValueError(f"{module} is W4A4 NVFP4, but its activations have no tensor_scale: calibrate it first, loaders need it")
            tensors[f"{module}.input_global_scale"] = StoredTensor.of(np.array([matrix.activations.tensor_scale], dtype=np.float32))
    else:
        tensors[f"{module}.weight_scale"] = StoredTensor.from_bits("U8", matrix.scales)  # as U8: the loader casts F8_E8M0 by value, to zeros
    if k := matrix.rotation.block_size:
        tensors[f"{module}.{_TRANSFORM if k == rotation else _transform(k)}_input.weight"] = _online_matrix(k)
    return tensors


def _transform(k: int) -> str:
    """What the transform is called of layers that have another block size than the rest."""
    return f"{_TRANSFORM}{k}"


def _online_matrix(k: int) -> StoredTensor:
    """The unnormalised ±1 Sylvester matrix in bfloat16, where it is exact: whoever applies it divides by sqrt(k) once."""
    matrix = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < k:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return StoredTensor.from_bits("BF16", (matrix.view(np.uint32) >> 16).astype(np.uint16))


def config(scheme: Scheme, ignore: list[str], rotations: Mapping[str, int | None]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json; ``ignore`` lists the linear modules left as they are, ``rotations`` the block sizes of those that have another than the scheme's."""
    weights: dict[str, object] = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if scheme.format == "nvfp4" else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
        "scale_dtype": "torch.float8_e4m3fn" if scheme.format == "nvfp4" else "torch.uint8",
        "zp_dtype": None,
    }
    dynamic: dict[str, object] = {"dynamic": "local", "observer": "static_minmax"} if scheme.format == "nvfp4" else {"dynamic": True, "observer": None}
    group = {
        "targets": ["Linear"],
        "format": _FORMAT_NAMES[scheme.format],
        "weights": weights,
        "input_activations": weights | dynamic if scheme.activations else None,
        "output_activations": None,
    }
    return {
        "quant_method": QUANT_METHOD,
        "format": _FORMAT_NAMES[scheme.format],
        "quantization_status": "compressed",
        "version": _LIBRARY_VERSION,
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": _transform_config(scheme.rotation, ignore, rotations) if scheme.rotation else {},
        "ignore": ignore,
        "config_groups": {"group_0": group},
    }


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config.json with bfloat16 as what it computes in: the library unpacks FP4 to bfloat16 whatever a model's own type, and a float16 or float32 one then fails on its first product."""
    if not config:
        return {}
    parts = {name: model_config(part) if name == "text_config" and isinstance(part, Mapping) else part for name, part in config.items()}
    keys = [key for key in ("dtype", "torch_dtype") if key in parts] or ["dtype"]
    return parts | dict.fromkeys(keys, "bfloat16")


def _transform_config(k: int, ignore: list[str], rotations: Mapping[str, int | None]) -> dict[str, Any]:
    def group(k: int, targets: list[str], ignore: list[str]) -> dict[str, Any]:
        apply = [{"targets": targets, "location": location, "inverse": inverse, "ignore": ignore} for location, inverse in (("input", False), ("weight_input", True))]
        return {"type": "hadamard", "randomize": False, "requires_grad": False, "head_dim": k, "precision": "torch.bfloat16", "apply": apply}

    groups = {_TRANSFORM: group(k, ["Linear"], [*ignore, *rotations])}
    for size in sorted({size for size in rotations.values() if size}, reverse=True):
        groups[_transform(size)] = group(size, [module for module, other in rotations.items() if other == size], ignore)
    return {"config_groups": groups}


def modules(names: Iterable[str]) -> list[str]:
    """The quantised modules among a checkpoint's tensor names."""
    return [name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed")]


def parts(module: str) -> list[str]:
    """Names of all tensors that ``module`` may have in this dialect."""
    transforms = [_TRANSFORM, *(_transform(1 << exponent) for exponent in range(1, 16))]
    return [f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", *(f"{transform}_input.weight" for transform in transforms))]


def decode(reader: CheckpointReader, module: str, quantization_config: Mapping[str, Any]) -> QuantizedMatrix:
    """The QuantizedMatrix of ``module``; ValueError names the tensor or the key that is missing or different."""
    where = f"{reader.path}: {module}"
    group = _group_of(quantization_config, where)
    weights = table(group.get("weights"), where, "weights of its config_group")
    bits, kind, size = (weights.get(key) for key in ("num_bits", "type", "group_size"))
    format = next((name for name in _FORMAT_NAMES if block_format(name).group_size == size and bits == 4 and kind == "float"), None)
    if format is None:
        raise ValueError(f"{where} has weights of {short_repr(bits)} bits, type {short_repr(kind)}, group size {short_repr(size)}; known: nvfp4 (4, float, 16) and mxfp4 (4, float, 32)")
    codes = stored_matrix(reader, f"{module}.weight_packed", "U8")
    scales = stored_scales(reader, f"{module}.weight_scale", "F8_E4M3" if format == "nvfp4" else "U8", format)
    divisor = stored_number(reader, f"{module}.weight_global_scale") if format == "nvfp4" else 1.0
    activations = None
    if group.get("input_activations"):
        activations = Activations(format, "even", stored_number(reader, f"{module}.input_global_scale") if format == "nvfp4" else None)
    block_size = _rotation(quantization_config, module, where)
    with located(where):
        return QuantizedMatrix(format, codes, scales, divisor, rotation_of(block_size), activations)


def _group_of(quantization_config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    groups = list(table(quantization_config.get("config_groups"), where, "config_groups").values())
    if len(groups) != 1:
        raise ValueError(f"{where}: quantization_config has {len(groups)} config_groups; this reader knows checkpoints with one")
    return table(groups[0], where, "its config_group")


def _rotation(quantization_config: Mapping[str, Any], module: str, where: str) -> int | None:
    """Block size of the module's rotation, None without; anything but a plain Hadamard on the input side is refused."""
    transforms = table(quantization_config.get("transform_config"), where, "transform_config")
    groups = [table(group, where, "a group of transform_config") for group in table(transforms.get("config_groups"), where, "config_groups of transform_config").values()]
    sizes = []
    for group in groups:
        apply = group.get("apply")
        parts = [part for part in apply if isinstance(part, Mapping)] if isinstance(apply, list) and len(apply) == 2 else []
        on_input = [part.get("location") for part in parts] in (["input", "weight_input"], ["weight_input", "input"])
        if group.get("type") != "hadamard" or group.get("randomize") or not group.get("head_dim") or not on_input:
            raise ValueError(f"{where}: transform_config is not a plain Hadamard of a given head_dim on the input side; other transforms are not read")
        if all(_matches(part.get("targets"), module, where) and not _matches(part.get("ignore") or [], module, where) for part in parts):
            sizes.append(group["head_dim"])
    if len(sizes) > 1:
        raise ValueError(f"{where} has {len(sizes)} transforms in transform_config; at most one rotation of a layer is read")
    return sizes[0] if sizes else None


def _matches(patterns: Any, module: str, where: str) -> bool:
    """Whether a list of the library's targets names a linear module: by its name, by a regular expression behind "re:", or as Linear."""
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{where}: transform_config has the targets {short_repr(patterns)}; they must be a list of names")
    return any(pattern in ("Linear", module) or (pattern.startswith("re:") and as_pattern(pattern[3:], "a target of transform_config").match(module)) for pattern in patterns)


def loaders(scheme: Scheme) -> str:
    """What reads such a checkpoint, and what reads it wrongly, in sentences."""
    if not scheme.rotation:
        return "Loads in transformers (with compressed-tensors), vLLM and SGLang."
    return (
        f"The weights are rotated by Hadamard {scheme.rotation}: whoever runs them must rotate each layer's input too. vLLM applies the rotation (tensor parallel size 1, no biases). "
        "transformers ignores it without an error (it lists the v_input tensors as unexpected) and answers nonsense, unless compressed_tensors.transform.apply_transform_config is called on the loaded model with the "
        'transform_config of config.json reduced to its "input" locations. `mrgptq evaluate` applies it. Use --rotation 0 for a checkpoint that every loader reads.'
    )
