"""A transformers model and its text: loading, token windows, the decoder's blocks."""

import logging
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..arrays import as_float32
from ..checkpoint import tensor_readers
from ..checkpoint.reader import MAX_TEXT_BYTES, CheckpointReader, read_config
from ..result import QuantizedMatrix
from .activations import round_inputs
from .experts import split_experts
from .linear import PackedLinear
from .shared import SharedInput

_log = logging.getLogger("mrgptq")
_MAKING = threading.Lock()


def load_model(folder: str | os.PathLike[str], *, device: str = "cpu") -> PreTrainedModel:
    """The causal language model in ``folder`` in float32, evaluation mode. No code of the checkpoint's own is run, no pickle is read, nothing is downloaded.

    Raises FileNotFoundError where ``folder`` has no config.json or no safetensors, ValueError where it is quantised (see :func:`load_quantized`), asks for code from elsewhere, lacks a weight or is not of its form.
    """
    target = as_device(device)
    config = checked_config(folder)
    if config.get("quantization_config"):
        raise ValueError(f"{folder} is quantised already, by {config['quantization_config'].get('quant_method')!r}")
    reader = CheckpointReader(folder)  # refuses links and an index that lead elsewhere, which transformers would follow
    with _without_bars(), by_transformers(folder, "model"):
        model, loading = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(f"{folder} does not fit its config.json: missing {sorted(loading['missing_keys'])[:3]}")
    split_experts(model, reader.names)
    return model.eval().to(target)


@contextmanager
def by_transformers(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Whatever transformers says of a folder that it cannot use, as a ValueError that names the folder: of a wrong setting it may be any exception."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{folder} needs what is not installed: {' '.join(str(error).split())}", name=error.name) from error
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{folder} has no {what} that transformers can load: {type(error).__name__}: {' '.join(str(error).split())}") from error


def as_device(device: str) -> torch.device:
    """ValueError where torch does not know the device or cannot use it."""
    try:
        target = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}, which torch cannot use here: {str(error).splitlines()[0]}") from None
    if target.type == "meta":
        raise ValueError(f"device is {device!r}, which holds shapes and no numbers")
    return target


@contextmanager
def _without_bars() -> Iterator[None]:
    """Loading takes seconds and shows no bar of its own between ours; the user's setting is put back."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def checked_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The config.json of a model folder that transformers may be let at: no side file is too large, no setting asks for code."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: there is no config.json in it; download the model first, for example with `hf download`")
    for side_file in Path(folder).iterdir():
        if side_file.suffix in (".json", ".jinja", ".txt", ".model") and side_file.is_file() and side_file.stat().st_size > MAX_TEXT_BYTES:
            raise ValueError(f"{side_file} has {side_file.stat().st_size} bytes; at most {MAX_TEXT_BYTES} are read")
    config = read_config(path)
    _refuse_code(config, path)
    return config


def _refuse_code(config: Mapping[str, Any], where: Path) -> None:
    """ValueError for settings by which transformers would fetch attention or expert kernels, which are programs, or read other weights than those that are checked here."""
    for key, value in config.items():
        if key == "transformers_weights" and value is not None:
            raise ValueError(f"{where} names its weights by {key}; only model.safetensors, or what model.safetensors.index.json lists, is read")
        if key == "num_labels" and isinstance(value, int) and value > 65536:
            raise ValueError(f"{where} has num_labels {value}, for each of which transformers would make an entry; at most 65536 are read")
        if "_implementation" in key and "/" in str(value):
            raise ValueError(f"{where} has {key} {short_repr(value)}, which is code from elsewhere; no code of a checkpoint is run")
        if isinstance(value, Mapping):
            _refuse_code(value, where)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules that this thread makes inside hold shapes for parameters and no numbers, but have their buffers, which no checkpoint holds.

    torch's own method is replaced meanwhile, so one thread at a time does so, and what others make is left as it is.
    """
    owner = threading.get_ident()

    def register_shape(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and threading.get_ident() == owner:
            parameter = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    with _MAKING:
        register = torch.nn.Module.register_parameter
        torch.nn.Module.register_parameter = register_shape  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _refuse_saving(*args: Any, **kwargs: Any) -> None:
    """In place of ``save_pretrained``, whose folder transformers would load with new random weights where packed ones are."""
    raise RuntimeError("a packed model is not saved by transformers, which knows no packed layers: copy the folder it came from, or write what mrgptq.load reads there with mrgptq.save")


def load_quantized(folder: str | os.PathLike[str], *, device: str = "cpu", kernels: bool | None = None) -> PreTrainedModel:
    """A checkpoint that mrgptq or another writer of its dialects made, as a float32 model that computes what its loader would.

    Parameters
    ----------
    folder : with config.json and safetensors.
    device : torch's.
    kernels : True keeps linear layers packed and multiplies by :func:`mrgptq.matmul` (:class:`PackedLinear`): half a byte a weight, W4A4 in whole numbers. On the CPU only. False dequantises weights to
        float32, turned back into the original basis, and rotates, rounds and turns back the inputs of W4A4 layers: the same up to float32's rounding, for any device. None: True on the CPU.

    Returns
    -------
    The model in evaluation mode. With packed layers its parameters want no gradient and ``save_pretrained`` is refused; a layer that is no plain ``torch.nn.Linear`` has its weight dequantised, with a warning.

    Raises
    ------
    FileNotFoundError : no config.json. ValueError : what does not fit it, by name; kernels on another device.
    """
    target = as_device(device)
    kernels = target.type == "cpu" if kernels is None else kernels
    if kernels and target.type != "cpu":
        raise ValueError(f"kernels is True, device {device!r}; the kernels run on the CPU")
    config = checked_config(folder)
    reader = CheckpointReader(folder)
    config.pop("quantization_config", None)
    with by_transformers(folder, "configuration"):
        plain = AutoConfig.for_model(**config)
    with parameters_on_meta(), by_transformers(folder, "model"):
        model = AutoModelForCausalLM.from_config(plain, dtype=torch.float32, trust_remote_code=False).eval()
    split_experts(model, reader.names)
    modules = dict(model.named_modules())
    state, layers = {}, {}
    for name, read in tensor_readers(reader).items():
        value, module = read(), name.removesuffix(".weight")
        if isinstance(value, QuantizedMatrix):
            layers[module] = value
            if kernels:
                kind = type(modules.get(module))
                if kind is torch.nn.Linear and (modules[module].out_features, modules[module].in_features) == value.shape:
                    continue
                if module in modules:
                    _log.warning("%s is a %s and no plain Linear: its weight is dequantised", module, kind.__name__)
            value = value.dequantize(unrotate=True)
        state[name] = torch.from_numpy(np.array(as_float32(value, name) if np.asarray(value).dtype.kind == "f" else value))
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # a shape that differs
        raise ValueError(f"{folder} does not fit its config.json: {error}") from None
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if plain.tie_word_embeddings else set()
    packed = {name for name in layers if f"{name}.weight" not in state}
    missing = [name for name in missing if name not in tied and name.removesuffix(".weight") not in packed]
    if missing or unexpected:
        raise ValueError(f"{folder} does not fit its config.json: missing {missing[:3]}, unexpected {unexpected[:3]}")
    shared = SharedInput()
    for name, layer in layers.items():
        if name in packed:
            model.set_submodule(name, PackedLinear(layer, modules[name].bias, shared))
        elif layer.activations:
            round_inputs([modules[name]], layer.activations, layer.rotation, shared)
    model.tie_weights()
    if packed:
        model.requires_grad_(False)
        model.save_pretrained = _refuse_saving
    if (Path(folder) / "generation_config.json").is_file():
        with by_transformers(folder, "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    return model.to(target)


def use_threads(threads: int) -> None:
    """How many threads torch takes for the forward passes of this process."""
    torch.set_num_threads(threads)


def cpu_capability() -> str:
    """Which instructions torch's own kernels use on this machine."""
    return str(torch.backends.cpu.get_cpu_capability())


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The tokenizer in ``folder``; no code of its own is run. FileNotFoundError where transformers can load none."""
    checked_config(folder)  # a folder that is no model is refused as that
    try:
        with by_transformers(folder, "tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            tokenizer("a", add_special_tokens=False)  # some settings are looked at only then
            return tokenizer
    except ValueError as error:
        raise FileNotFoundError(str(error)) from error


def token_windows(tokenizer: Any, text: str, windows: int, sequence: int, *, targets: bool = False) -> Any:
    """Cut a text into windows of tokens that follow each other, without a BOS token.

    Parameters
    ----------
    text : str. windows : how many, at most. sequence : tokens in each.
    targets : leave one token after the last window, for predicting the next token of every position.

    Returns
    -------
    (n, sequence) int64 tensor, or with ``targets`` a pair of them, the second shifted by one; n is smaller than ``windows`` where the text is short.

    Raises
    ------
    ValueError : the text is too short for a single window.
    """
    needed = windows * sequence + bool(targets)
    characters = 8 * needed
    while True:  # a long text is tokenised only as far as needed; the last word of a cut may differ, hence the margin
        ids = tokenizer(text[:characters], add_special_tokens=False)["input_ids"]
        if len(ids) >= needed + 16 or characters >= len(text):
            break
        characters *= 2
    count = min(windows, (len(ids) - bool(targets)) // sequence)
    if count < 1:
        raise ValueError(f"the text has {len(ids)} tokens; one window needs {sequence + bool(targets)}")
    ids = torch.tensor(ids[: count * sequence + 1], dtype=torch.int64)
    inputs = ids[: count * sequence].reshape(count, sequence)
    return (inputs, ids[1 : count * sequence + 1].reshape(count, sequence)) if targets else inputs


def decoder_blocks(model: torch.nn.Module) -> tuple[str, torch.nn.ModuleList]:
    """(prefix, ModuleList) of the decoder's blocks: the longest list of numbered modules that the model has.

    Raises ValueError for a model without one.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module) and not re.search(r"\.\d+(\.|$)", name)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks; calibration works block by block")
    return max(lists, key=lambda item: len(item[1]))
