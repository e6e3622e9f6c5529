"""What layers that read one input make of it: q, k and v round or turn their input once."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

_T = TypeVar("_T")


class _Made(NamedTuple):
    tensor: "weakref.ref[torch.Tensor]"
    version: int
    how: object
    value: Any


class SharedInput:
    """The last input of several layers and what was made of it.

    Nothing is kept longer than the tensor lives, and nothing of a tensor that was written to since, as far as torch counts: what NumPy or ``.data`` writes it does not see.
    """

    def __init__(self) -> None:
        self._last: _Made | None = None

    def __reduce__(self) -> Any:
        return SharedInput, ()  # copies and files of a model begin without

    def of(self, x: torch.Tensor, how: object, make: Callable[[], _T]) -> _T:
        """``make()``, or what it gave when it was last called for the same tensor and an equal ``how``."""
        if x.is_inference():  # such tensors do not tell when they are written to
            return make()
        last = self._last  # read once: another thread may run the model meanwhile
        if last is not None and last.tensor() is x and last.version == x._version and last.how == how:
            return last.value
        version, value = x._version, make()
        self._last = _Made(weakref.ref(x, self._forget), version, how, value)
        return value

    def _forget(self, reference: Any) -> None:
        if self._last is not None and self._last.tensor is reference:
            self._last = None
