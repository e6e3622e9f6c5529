"""How codes and scales lie in memory: two codes a byte, scales in the tiles that tensor cores read."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .arrays import as_threads

TILE_ROWS, TILE_COLS = 128, 4


def _bytes(array: ArrayLike, name: str) -> NDArray[np.uint8]:
    values = np.asarray(array)
    if values.dtype != np.uint8 or values.ndim != 2:
        raise ValueError(f"{name} is {values.dtype} of shape {values.shape}; it must be a uint8 matrix")
    return np.ascontiguousarray(values)


def pack(codes: ArrayLike, *, threads: int | None = None) -> NDArray[np.uint8]:
    """(rows, cols) codes 0 … 15 to (rows, cols / 2) uint8, the even column in the low nibble."""
    values = _bytes(codes, "codes")
    if values.shape[1] % 2:
        raise ValueError(f"codes has {values.shape[1]} columns; two share a byte")
    if values.size and values.max() > 15:
        raise ValueError(f"codes holds {values.max()}; a code is 0 … 15")
    return _core.pack(values, as_threads(threads))


def unpack(packed: ArrayLike, *, threads: int | None = None) -> NDArray[np.uint8]:
    """(rows, cols / 2) uint8 to (rows, cols) codes 0 … 15, the inverse of :func:`pack`."""
    return _core.unpack(_bytes(packed, "packed"), as_threads(threads))


def to_blocked(scales: ArrayLike) -> NDArray[np.uint8]:
    """Scales in 128 x 4 tiles, as Blackwell's matrix instructions read them (cuBLAS: "1D block scaling factors layout"; QuTLASS, torchao: ``to_blocked``).

    Parameters
    ----------
    scales : (rows, groups) uint8, such as ``QuantizedMatrix.scales``. Zeros fill up the last tiles.

    Returns
    -------
    (ceil(rows / 128) * ceil(groups / 4) * 512,) uint8, tile after tile along a row of them: the scale of row m and group k stands in its tile at m % 32 * 16 + m % 128 // 32 * 4 + k % 4.
    """
    values = _bytes(scales, "scales")
    rows, groups = values.shape
    down, across = -(-rows // TILE_ROWS), -(-groups // TILE_COLS)
    padded = np.zeros((down * TILE_ROWS, across * TILE_COLS), dtype=np.uint8)
    padded[:rows, :groups] = values
    return np.ascontiguousarray(padded.reshape(down, 4, 32, across, TILE_COLS).transpose(0, 3, 2, 1, 4)).reshape(-1)


def from_blocked(blocked: ArrayLike, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """The (rows, groups) scales of that shape from their tiles, the inverse of :func:`to_blocked`; what fills up the tiles is not looked at."""
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(isinstance(n, (int, np.integer)) and n > 0 for n in shape):
        raise ValueError(f"shape is {shape!r}; it must be two integers from 1 on, (rows, groups)")
    rows, groups = shape
    down, across = -(-rows // TILE_ROWS), -(-groups // TILE_COLS)
    values = np.asarray(blocked)
    if values.dtype != np.uint8 or values.size != down * across * TILE_ROWS * TILE_COLS:
        raise ValueError(f"blocked is {values.dtype} with {values.size} elements; the tiles of {rows} x {groups} scales are {down * across * TILE_ROWS * TILE_COLS} of uint8")
    tiles = values.reshape(down, across, 32, 4, TILE_COLS).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(tiles.reshape(down * TILE_ROWS, across * TILE_COLS)[:rows, :groups])
