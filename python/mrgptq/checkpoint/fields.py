"""Single tensors of a quantised layer, refused where they are not of the form that every dialect needs."""

import numpy as np
from numpy.typing import NDArray

from .reader import CheckpointReader


def stored_matrix(reader: CheckpointReader, name: str, dtype: str) -> NDArray[np.uint8]:
    """Bits of the matrix ``name``; ValueError unless it has the safetensors dtype and two axes."""
    tensor = reader.tensor(name)
    if tensor.dtype != dtype or len(tensor.shape) != 2:
        raise ValueError(f"{reader.path}: {name} is {tensor.dtype} of shape {tensor.shape}; it must be a {dtype} matrix")
    return tensor.bits


def stored_number(reader: CheckpointReader, name: str) -> float:
    """The one positive finite number in ``name``, as a float."""
    values = np.asarray(reader.tensor(name), dtype=np.float32).reshape(-1)
    if values.size != 1 or not (np.isfinite(values[0]) and values[0] > 0):
        raise ValueError(f"{reader.path}: {name} is {values[:4].tolist()}; it must be one positive number")
    return float(values[0])
