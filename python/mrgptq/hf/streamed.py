"""A model of which one block at a time is in memory: the others are read from the checkpoint when their turn comes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..arrays import as_float32
from ..checkpoint.reader import CheckpointReader
from ..result import QuantizedMatrix
from .blocks import BlockSource
from .experts import split_experts
from .model import as_device, by_transformers, checked_config, decoder_blocks, parameters_on_meta


class StreamedBlocks(BlockSource):
    """Blocks of a model that :func:`load_streamed` made: each holds numbers inside its context alone.

    Parameters
    ----------
    answer : gives a module's matrix where it has been quantised; its values take the place of the checkpoint's in the blocks that are ``done``.
    """

    streamed = True

    def __init__(self, folder: str | os.PathLike[str], model: Any, answer: Callable[[str], QuantizedMatrix | None]) -> None:
        self._prefix, blocks = decoder_blocks(model)
        super().__init__(blocks)
        self._reader, self._answer = CheckpointReader(folder), answer
        self._device = model.get_input_embeddings().weight.device

    @contextmanager
    def at(self, index: int) -> Iterator[torch.nn.Module]:
        """The block with its numbers, which are gone when the context ends."""
        block = self.blocks[index]
        for name, _ in list(block.named_parameters()):
            whole = f"{self._prefix}.{index}.{name}"
            matrix = self._answer(whole.removesuffix(".weight")) if index < self.done else None
            values = torch.from_numpy(matrix.dequantize(unrotate=True)) if matrix is not None else _read(self._reader, whole)
            _set_parameter(block, name, values.to(self._device))
        try:
            yield block
        finally:
            for name, parameter in list(block.named_parameters()):
                _set_parameter(block, name, parameter.detach().to("meta"))


def load_streamed(folder: str | os.PathLike[str], *, device: str = "cpu") -> Any:
    """The model in ``folder`` in float32 with everything but its blocks in memory, for :class:`StreamedBlocks`.

    Returns None where the checkpoint names its tensors otherwise than the model does (see :func:`.experts.split_experts` for what can be taken apart), so that blocks cannot be read one by one.
    """
    target = as_device(device)
    with by_transformers(folder, "model"), parameters_on_meta():
        config = AutoConfig.for_model(**checked_config(folder))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
    reader = CheckpointReader(folder)
    split_experts(model, reader.names)
    prefix, _ = decoder_blocks(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {}) if config.tie_word_embeddings else set()
    parameters = {name: parameter.shape for name, parameter in model.named_parameters() if name not in tied}
    buffers = {name: buffer.shape for name, buffer in model.state_dict().items() if name not in tied and name not in parameters}  # those that checkpoints hold, as of a router's biases
    if any(name not in reader or tuple(reader.shape(name)) != tuple(shape) for name, shape in (parameters | buffers).items()):
        return None
    for name in parameters:
        if not name.startswith(f"{prefix}."):
            _set_parameter(model, name, _read(reader, name).to(target))
    for name in buffers:
        model.get_buffer(name).copy_(_read(reader, name))
    model.tie_weights()
    for buffer_owner in model.modules():
        for name, buffer in list(buffer_owner.named_buffers(recurse=False)):
            setattr(buffer_owner, name, buffer.to(target))
    return model.requires_grad_(False)


def _read(reader: CheckpointReader, name: str) -> torch.Tensor:
    """A tensor of the checkpoint in float32, in memory of its own."""
    return torch.from_numpy(np.require(as_float32(reader.tensor(name), name), requirements="W"))


def _set_parameter(module: torch.nn.Module, name: str, values: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner).register_parameter(leaf, torch.nn.Parameter(values, requires_grad=False))
