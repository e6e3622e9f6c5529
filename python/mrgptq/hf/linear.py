"""A linear layer on packed weights: its product is :func:`mrgptq.matmul`, its inputs are rounded as its checkpoint says."""

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from ..activations import quantize_activations
from ..arrays import pad_columns
from ..matmul import matmul
from ..prepack import PrepackedMatrix, prepack
from ..result import Activations, QuantizedMatrix
from ..rotations import Dense, Identity, rotation_of
from .activations import to_numpy
from .shared import SharedInput


class PackedLinear(torch.nn.Module):
    """x W^T + b in place of a ``torch.nn.Linear``, W packed: half a byte a weight and its share of scales, in the order of :func:`mrgptq.prepack`.

    ``code_tiles`` and ``scale_tiles`` are buffers, so that the layer is copied, counted and stored like any other; what else the codes mean goes with them in ``state_dict()``. ``weight`` there is none. It answers
    in x's dtype, computed in float32, and is for inference: on the CPU, without gradients. Takes torch's number of threads; the answer is the same for any.

    Parameters
    ----------
    matrix : (rows, cols) QuantizedMatrix, copied. bias : (rows,) parameter. shared : one for all layers of a model, so that an input which several read is rounded or turned once.

    Raises
    ------
    RuntimeError : an input that wants a gradient, or one that is not on the CPU; a state of another shape. TypeError : an input of whole numbers. ValueError : another number of columns, and what ``mrgptq.matmul`` refuses, such as values that are not finite.
    """

    code_tiles: torch.Tensor
    scale_tiles: torch.Tensor

    def __init__(self, matrix: QuantizedMatrix, bias: torch.nn.Parameter | None = None, shared: SharedInput | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.format, self.tensor_scale, self.rotation, self.activations, self.padding = matrix.format, matrix.tensor_scale, matrix.rotation, matrix.activations, matrix.padding
        tiles = prepack(matrix, threads=torch.get_num_threads())
        self.register_buffer("code_tiles", torch.from_numpy(tiles.code_tiles.view(np.int32)))  # torch does little with uint32
        self.register_buffer("scale_tiles", torch.from_numpy(tiles.scale_tiles.view(np.int32)))
        self.bias = bias
        self._shared = SharedInput() if shared is None else shared

    @property
    def matrix(self) -> PrepackedMatrix:
        """The weight, sharing memory with the buffers; ``matrix.unpack()`` is the one that it was made from."""
        codes, scales = self.code_tiles.numpy().view(np.uint32), self.scale_tiles.numpy().view(np.uint32)
        return PrepackedMatrix(self.format, (self.out_features, self.in_features), codes, scales, self.tensor_scale, self.rotation, self.activations, self.padding)

    def get_extra_state(self) -> torch.Tensor:
        """What the codes need beside them, JSON as uint8: a tensor, which any file of tensors can hold."""
        rotation = self.rotation.matrix.tolist() if isinstance(self.rotation, Dense) else self.rotation.block_size
        said = {"shape": [self.out_features, self.in_features], "format": self.format, "tensor_scale": self.tensor_scale, "rotation": rotation, "activations": None if self.activations is None else asdict(self.activations), "padding": self.padding}
        return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take over what :meth:`get_extra_state` gave."""
        said = json.loads(bytes(state.tolist()))
        self.format, self.tensor_scale, self.padding = said["format"], said["tensor_scale"], said["padding"]
        self.rotation = Dense(said["rotation"]) if isinstance(said["rotation"], list) else rotation_of(said["rotation"])
        self.activations = None if said["activations"] is None else Activations(**said["activations"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str]) -> None:
        """Refuses another shape's state before any of it is taken: tiles alone do not tell how many rows are in the last."""
        said = state_dict.get(f"{prefix}_extra_state")
        if said is not None and (shape := json.loads(bytes(said.tolist()))["shape"]) != [self.out_features, self.in_features]:
            error_msgs.append(f"{prefix.rstrip('.') or 'the packed layer'} has {self.out_features} x {self.in_features} weights; the state is of {shape[0]} x {shape[1]}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        if x.device.type != "cpu" or self.code_tiles.device.type != "cpu":
            raise RuntimeError(f"a packed layer runs on the CPU; its input is on {x.device}, its weight on {self.code_tiles.device}: load the checkpoint with kernels=False for another device")
        if not x.is_floating_point():
            raise TypeError(f"a packed layer's input is {x.dtype}; it must be a floating-point tensor")
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"a packed layer's input has shape {tuple(x.shape)}; its last dimension must be {self.in_features}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a packed layer has no gradient: run it under torch.no_grad(), or load the checkpoint with kernels=False")
        out = torch.empty(*x.shape[:-1], self.out_features, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        if x.numel():
            self._multiply(x, out.view(-1, self.out_features))
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype)

    def _multiply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """The product into ``out`` (tokens, out_features) float32."""
        matrix, turn, threads = self.matrix, self.rotation.dual, torch.get_num_threads()
        values, dtype = to_numpy(x)
        values = pad_columns(values.reshape(-1, values.shape[-1]), self.padding)
        whole = replace(matrix, shape=(self.out_features, values.shape[1]), padding=0) if self.padding else matrix
        if (rounding := self.activations) is not None:
            packed = self._shared.of(x, (rounding, turn), lambda: quantize_activations(
                values, rounding.format, rule=rounding.rule, mx_rule=rounding.mx_rule, tensor_scale=rounding.tensor_scale, rotation=turn, dtype=dtype, threads=threads
            ))  # fmt: skip
            matmul(packed, whole, out=out.numpy(), threads=threads)
        elif turn != Identity():
            turned = self._shared.of(x, turn, lambda: turn.apply(values, dtype=dtype, threads=threads))
            matmul(turned, replace(whole, rotation=Identity()), out=out.numpy(), threads=threads)
        else:
            matmul(values, whole, dtype=dtype, out=out.numpy(), threads=threads)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        rounded = "" if self.activations is None else f", inputs {self.activations.format}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}{rounded}, rotation={self.rotation!r}, bias={self.bias is not None}"
