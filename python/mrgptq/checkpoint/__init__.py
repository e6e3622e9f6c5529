"""Checkpoints on disk: reads and writes quantised models in the dialects that loaders know."""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from ..arrays import choose
from ..recipe import Recipe
from ..result import LayerReport, QuantizedMatrix
from . import compressed_tensors, fp_quant, own
from .card import RECORD_NAME, model_card
from .hessians import load_hessians, merge_hessians, save_hessians
from .reader import CheckpointReader
from .safetensors import shown
from .scheme import Scheme, common_scheme
from .stored_tensor import StoredTensor
from .writer import CheckpointWriter

DIALECTS = {dialect.QUANT_METHOD: dialect for dialect in (compressed_tensors, fp_quant, own)}
_Quantised = dict[str, tuple[Scheme, int | None, Recipe | None, LayerReport | None]]
_NUMPY_NAMES = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "F32", "F64", "C64"}


def dialect_named(name: str) -> ModuleType:
    """The dialect's module; ValueError lists the known names."""
    return DIALECTS[choose("dialect", name, tuple(DIALECTS))]


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    dialect: str = "compressed-tensors",
    *,
    config: Mapping[str, Any] | None = None,
    side_files: Iterable[str | os.PathLike[str]] = (),
    max_shard_bytes: int = 5_000_000_000,
    expected_bytes: int | None = None,
    build_in: Path | None = None,
) -> None:
    """Write a checkpoint folder: weights, config.json, model card, record of the run. It appears whole or not at all.

    Parameters
    ----------
    path : a folder that does not exist yet.
    tensors : mapping of tensor names to values, or an iterable of such pairs (then they are written as they come). ``"<module>.weight"`` may be a QuantizedMatrix; the
        rest are arrays (numpy or ml_dtypes) or StoredTensors and are stored as they are.
    dialect : "compressed-tensors", "fp_quant", or "mrgptq" for what only our own runtime carries out.
    config : the model's config.json as a dict; ``quantization_config`` is added, and for "compressed-tensors" the type that the model computes in becomes bfloat16, the one its loaders unpack to.
    side_files : paths of small files to copy beside it, such as the tokenizer's.
    max_shard_bytes : a file is closed before it grows beyond that.
    expected_bytes : refuse at once if the filesystem has less room.
    build_in : an empty folder on the same filesystem to build it in, or the name of one; None is a hidden one beside ``path``.

    Raises
    ------
    ValueError : layers of different kinds, or something the dialect cannot store, by name. FileExistsError : ``path`` is there. OSError : no space left, with the file's name.
    """
    target = dialect_named(dialect)
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    common = common_scheme(_quantized(tensors)) if isinstance(tensors, Mapping) else None
    if common is not None:
        target.check(common)
    kept: list[tuple[str, tuple[int, ...]]] = []
    quantised: _Quantised = {}
    with CheckpointWriter(path, max_shard_bytes, build_in) as writer:
        if expected_bytes is not None:
            writer.expect(expected_bytes)
        for name, value in pairs:
            if not isinstance(value, QuantizedMatrix):
                writer.add(name, value)
                kept.append((name, StoredTensor.of(value).shape))
                continue
            module = name.removesuffix(".weight")
            if module == name:
                raise ValueError(f"the QuantizedMatrix {shown(name)} must be called <module>.weight")
            own = common or Scheme.of_matrix(value)
            check_layer(target, module, value.padding, value.rotation.block_size, own.rotation)
            for part, tensor in target.encode(module, value, own.rotation).items():
                writer.add(part, tensor)
            # Only what the record needs is kept: the codes may be large and are on their way to the disk.
            quantised[module] = (own, value.rotation.block_size, value.recipe, value.report)
        scheme = _one_scheme(quantised)
        target.check(scheme)
        ignore = _unquantised_linears(kept)
        recipe = next(iter(quantised.values()))[2]
        rotations = {module: size for module, (_, size, _, _) in quantised.items() if size != scheme.rotation}
        writer.write_json("config.json", {**target.model_config(config or {}), "quantization_config": target.config(scheme, ignore, rotations)})
        writer.write_json(RECORD_NAME, _record(quantised, recipe, dialect))
        writer.write_text("README.md", model_card(scheme, dialect, loaders(dialect, scheme, quantised), recipe, _title(config or {})))
        for file in side_files:
            writer.copy(file)


def check_layer(dialect: ModuleType, module: str, padding: int, rotation: int | None, asked: int | None) -> None:
    """ValueError for what a dialect cannot store of one layer: columns of zeros, a rotation of another block size than the other layers'."""
    if padding and not dialect.PADS:
        raise ValueError(f'{module} has {padding} columns of zeros behind its own; {dialect.QUANT_METHOD} cannot say so: leave the layer out with ignore, or use the dialect "mrgptq"')
    if rotation != asked and not dialect.ROTATES_BY_LAYER:
        raise ValueError(f"{module} has columns that a rotation of block size {asked} does not divide, {rotation} does; {dialect.QUANT_METHOD} stores one block size for all layers: ask for rotation {rotation}")


def loaders(dialect: str, scheme: Scheme, modules: Iterable[str]) -> str:
    """What reads a checkpoint of these quantised modules, and what reads it wrongly, in sentences."""
    target = dialect_named(dialect)
    experts = any(".experts." in module for module in modules)
    return " ".join(filter(None, (target.loaders(scheme), target.EXPERTS if experts else "")))


def _title(config: Mapping[str, Any]) -> str:
    """What a model card calls the model: its architecture, not the folder's name, so that the same run gives the same bytes anywhere."""
    architectures = config.get("architectures")
    return str(architectures[0]) if isinstance(architectures, list) and architectures else str(config.get("model_type", "Model"))


def _quantized(tensors: Mapping[str, Any]) -> dict[str, QuantizedMatrix]:
    return {name: value for name, value in tensors.items() if isinstance(value, QuantizedMatrix)}


def _one_scheme(quantised: _Quantised) -> Scheme:
    schemes = {scheme: module for module, (scheme, _, _, _) in reversed(quantised.items())}
    if len(schemes) > 1:
        raise ValueError("one checkpoint holds layers of one kind, but " + " and ".join(f"{module} is {scheme.label}" for scheme, module in list(schemes.items())[:2]))
    if not schemes:
        raise ValueError("there is no QuantizedMatrix among the tensors; nothing to say in the configuration")
    return next(iter(schemes))


def _unquantised_linears(kept: list[tuple[str, tuple[int, ...]]]) -> list[str]:
    """Modules that a loader would take for quantised unless it is told: every matrix that was kept, and lm_head, whose weight is not in the file where embeddings are tied."""
    matrices = [name.removesuffix(".weight") for name, shape in kept if name.endswith(".weight") and len(shape) == 2 and "embed" not in name]
    return list(dict.fromkeys([*matrices, "lm_head"]))


def _record(quantised: _Quantised, recipe: Recipe | None, dialect: str) -> dict[str, Any]:
    # Without the seconds, which no two runs share: the same run gives the same bytes.
    layers = {module: {name: value for name, value in report.as_dict().items() if name != "seconds"} for module, (_, _, _, report) in quantised.items() if report is not None}
    return {"mrgptq": version("mrgptq"), "dialect": dialect, "recipe": recipe.as_dict() if recipe is not None else None, "layers": layers}


def load(path: str | os.PathLike[str]) -> dict[str, QuantizedMatrix | NDArray[Any] | StoredTensor]:
    """Read a checkpoint folder or file.

    Returns
    -------
    dict of tensor names to QuantizedMatrix (under ``"<module>.weight"``), numpy arrays (read-only views of the mapped file), or StoredTensor for the types numpy lacks, such as
    BF16: ``numpy.asarray`` widens one to float32, and every function of this package takes it as it is.

    Raises
    ------
    FileNotFoundError : no such folder, or a missing shard. ValueError : a damaged or foreign file, by file, tensor and reason; an unknown dialect.
    """
    reader = CheckpointReader(path)
    return {name: read() for name, read in tensor_readers(reader).items()}


def tensor_readers(reader: CheckpointReader) -> dict[str, Callable[[], QuantizedMatrix | NDArray[Any] | StoredTensor]]:
    """A function for each logical tensor of an open checkpoint, in order, which reads that one; see :func:`load`."""
    quantization_config = reader.config.get("quantization_config")
    readers: dict[str, Callable[[], QuantizedMatrix | NDArray[Any] | StoredTensor]] = {}
    parts: set[str] = set()
    if quantization_config:
        dialect = dialect_of(quantization_config, reader.path)
        for module in dialect.modules(reader.names):
            if f"{module}.weight" in reader:
                raise ValueError(f"{reader.path} has a tensor {shown(f'{module}.weight')} beside the packed one of that name")
            readers[f"{module}.weight"] = partial(dialect.decode, reader, module, quantization_config)
            parts.update(dialect.parts(module))
    for name in reader.names:
        if name not in parts:
            readers[name] = partial(_plain, reader, name)
    return readers


def dialect_of(quantization_config: Mapping[str, Any], where: str | os.PathLike[str]) -> ModuleType:
    """The dialect that a quantization_config is written in; ValueError names its quant_method."""
    method = quantization_config.get("quant_method")
    if not isinstance(method, str) or method not in DIALECTS:
        raise ValueError(f"{os.fspath(where)} is quantised by {shown(method)}; known: {', '.join(DIALECTS)}")
    return DIALECTS[method]


def _plain(reader: CheckpointReader, name: str) -> NDArray[Any] | StoredTensor:
    tensor = reader.tensor(name)
    return tensor.bits if tensor.dtype in _NUMPY_NAMES else tensor
