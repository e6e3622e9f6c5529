"""A linear layer on packed weights: its product is :func:`mrgptq.matmul`, its inputs are rounded as its checkpoint says."""

import weakref
from typing import Any

import torch

from ..activations import quantize_activations
from ..matmul import matmul
from ..result import Activations, QuantizedMatrix
from ..rotations import Rotation
from .activations import to_numpy


class SharedInput:
    """The last input that layers of one model rounded: q, k and v read one tensor, which is rounded once.

    Nothing is kept longer than the tensor lives, and nothing of a tensor that was written to since.
    """

    def __init__(self) -> None:
        self._tensor: weakref.ref[torch.Tensor] | None = None
        self._how: tuple[int, Activations, Rotation] | None = None
        self._packed: QuantizedMatrix | None = None

    def __reduce__(self) -> Any:
        return SharedInput, ()  # copies and files of a model begin without

    def rounded(self, x: torch.Tensor, activations: Activations, rotation: Rotation, threads: int) -> QuantizedMatrix:
        """(tokens, cols) of ``x`` (..., cols), turned and rounded."""
        how = None if x.is_inference() else (x._version, activations, rotation)  # inference tensors do not tell when they are written to
        if self._packed is not None and self._tensor is not None and self._tensor() is x and self._how == how:
            return self._packed
        values, dtype = to_numpy(x)
        packed = quantize_activations(
            values.reshape(-1, values.shape[-1]), activations.format, rule=activations.rule, mx_rule=activations.mx_rule, tensor_scale=activations.tensor_scale, rotation=rotation, dtype=dtype, threads=threads
        )
        if how is None:
            return packed
        self._tensor, self._how, self._packed = weakref.ref(x, self._forget), how, packed
        return packed

    def _forget(self, reference: Any) -> None:
        if self._tensor is reference:
            self._tensor = self._how = self._packed = None


class PackedLinear(torch.nn.Module):
    """x W^T + b in place of a ``torch.nn.Linear``, W packed: half a byte a weight and its share of scales.

    ``codes`` and ``scales`` are buffers, so that the layer is copied, counted and stored like any other; ``weight`` there is none. It answers in x's dtype, computed in float32, and is for inference:
    on the CPU, without gradients. Takes torch's number of threads.

    Raises
    ------
    RuntimeError : an input that wants a gradient, or one that is not on the CPU. ValueError : what ``mrgptq.matmul`` refuses, such as values that are not finite.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, matrix: QuantizedMatrix, bias: torch.nn.Parameter | None = None, shared: SharedInput | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.shape
        self.format, self.tensor_scale, self.rotation, self.activations = matrix.format, matrix.tensor_scale, matrix.rotation, matrix.activations
        self.register_buffer("codes", torch.from_numpy(matrix.codes.copy()))
        self.register_buffer("scales", torch.from_numpy(matrix.scales.copy()))
        self.bias = bias
        self._shared = shared or SharedInput()

    @property
    def matrix(self) -> QuantizedMatrix:
        """The weight, sharing memory with the buffers."""
        return QuantizedMatrix(self.format, self.codes.numpy(), self.scales.numpy(), self.tensor_scale, self.rotation, self.activations)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features)."""
        if x.device.type != "cpu" or self.codes.device.type != "cpu":
            raise RuntimeError(f"a packed layer runs on the CPU; its input is on {x.device}, its weight on {self.codes.device}: load the checkpoint with kernels=False for another device")
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("a packed layer has no gradient: run it under torch.no_grad(), or load the checkpoint with kernels=False")
        out = torch.empty(*x.shape[:-1], self.out_features)
        if not x.numel():
            return out.to(x.dtype)
        matrix, flat, threads = self.matrix, out.view(-1, self.out_features).numpy(), torch.get_num_threads()
        if self.activations is None:
            values, dtype = to_numpy(x)
            matmul(values.reshape(-1, values.shape[-1]), matrix, dtype=dtype, out=flat, threads=threads)
        else:
            matmul(self._shared.rounded(x, self.activations, self.rotation.dual, threads), matrix, out=flat, threads=threads)
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        rounded = "" if self.activations is None else f", inputs {self.activations.format}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.format}{rounded}, rotation={self.rotation!r}, bias={self.bias is not None}"
