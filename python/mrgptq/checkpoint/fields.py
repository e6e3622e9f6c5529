"""Single tensors and settings of a quantised layer, refused where they are not of the form that every dialect needs."""

from collections.abc import Mapping
from reprlib import repr as short_repr
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reader import CheckpointReader


FLOATS = ("F32", "F64", "F16", "BF16")


def table(value: Any, where: str, key: str) -> Mapping[str, Any]:
    """``value`` as the table that the configuration should have under ``key``, empty for null; ValueError for anything else."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"{where}: {key} is {short_repr(value)}; it must be a table")
    return value or {}


def stored_scales(reader: CheckpointReader, name: str, dtype: str, format: str) -> NDArray[np.uint8]:
    """:func:`stored_matrix`; ValueError for scales that are no numbers, which nothing writes and which would make none of whatever they are multiplied with."""
    scales = stored_matrix(reader, name, dtype)
    bad = (scales & 0x7F) == 0x7F if format == "nvfp4" else scales == 0xFF
    if bad.any():
        row, col = np.unravel_index(int(bad.argmax()), bad.shape)
        raise ValueError(f"{reader.path}: {name} is NaN at row {row}, column {col}; every scale must be a number")
    return scales


def stored_matrix(reader: CheckpointReader, name: str, dtype: str) -> NDArray[np.uint8]:
    """Bits of the matrix ``name``; ValueError unless it has the safetensors dtype, two axes and anything in it."""
    tensor = reader.tensor(name)
    if tensor.dtype != dtype or len(tensor.shape) != 2 or not tensor.nbytes:
        raise ValueError(f"{reader.path}: {name} is {tensor.dtype} of shape {tensor.shape}; it must be a {dtype} matrix that is not empty")
    return tensor.bits


def stored_number(reader: CheckpointReader, name: str) -> float:
    """The one positive finite number in ``name``, as a float."""
    tensor = reader.tensor(name)
    if tensor.dtype not in FLOATS or tensor.bits.size > 4:  # before it is widened, for it might be large
        raise ValueError(f"{reader.path}: {name} is {tensor.dtype} of shape {tensor.shape}; it must be one positive number")
    values = np.asarray(tensor, dtype=np.float32).reshape(-1)
    if values.size != 1 or not (np.isfinite(values[0]) and values[0] > 0):
        raise ValueError(f"{reader.path}: {name} is {values.tolist()}; it must be one positive number")
    return float(values[0])
