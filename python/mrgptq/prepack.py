"""Packed weights in the order in which products read them."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from . import _core
from .arrays import as_threads
from .display import Shown, format_bytes
from .formats import block_format
from .result import Activations, QuantizedMatrix
from .rotations import Identity, Rotation

_TILE_ROWS, _CODES_A_WORD, _SCALES_A_WORD = 32, 8, 4
_CACHE_LINE = 64  # bytes


@dataclass(frozen=True, repr=False, eq=False)
class PrepackedMatrix(Shown):
    """A weight for :func:`matmul`, which gives the same bytes with it as with the matrix that it was made from. Made by :func:`prepack`; for this machine's memory, not for files.

    Attributes
    ----------
    format, tensor_scale, rotation, activations : as of the QuantizedMatrix.
    shape : (rows, cols).
    code_tiles : (tiles, cols / 8, 32) uint32, 32 rows a tile: words of eight codes, four bytes of a row as they lie there, beside those of the other rows. scale_tiles : (tiles, ceil(groups / 4), 32) uint32,
        words of four scales. What lies behind the last row and the last scale is zero.
    padding : as of the QuantizedMatrix: columns of zeros behind those of ``shape``, which the tiles have.
    """

    format: str
    shape: tuple[int, int]
    code_tiles: NDArray[np.uint32]
    scale_tiles: NDArray[np.uint32]
    tensor_scale: float
    rotation: Rotation = field(default_factory=Identity)
    activations: Activations | None = None
    padding: int = 0

    def __post_init__(self) -> None:
        group = block_format(self.format).group_size
        whole = self.shape[1] + self.padding
        if whole % group or not 0 <= self.padding < group:
            raise ValueError(f"shape is {self.shape}{f' and padding {self.padding}' if self.padding else ''}; {self.format} has one scale for {group} columns")
        self.rotation.check_columns(whole, "the matrix")
        for name, expected in zip(("code_tiles", "scale_tiles"), _tile_shapes(self.format, (self.shape[0], whole)), strict=True):
            array = getattr(self, name)
            if array.dtype != np.uint32 or array.shape != expected:
                raise ValueError(f"{name} is {array.dtype} of shape {array.shape}; {self.format} of {self.shape[0]} x {self.shape[1]} has uint32 of {expected}")

    @property
    def nbytes(self) -> int:
        """Bytes in memory: those of the QuantizedMatrix's arrays and what fills up the last tile and the last words of scales."""
        return self.code_tiles.nbytes + self.scale_tiles.nbytes

    def unpack(self, *, threads: int | None = None) -> QuantizedMatrix:
        """The QuantizedMatrix again, without its recipe, report and clip mask."""
        rows, cols = self.shape[0], self.shape[1] + self.padding
        codes, scales = np.empty((rows, cols // 2), np.uint8), np.empty((rows, cols // block_format(self.format).group_size), np.uint8)
        _core.read_tiles(self.core_arrays(), codes, scales, as_threads(threads))
        return QuantizedMatrix(self.format, codes, scales, self.tensor_scale, self.rotation, self.activations, padding=self.padding)

    def core_arrays(self) -> tuple[str, int, NDArray[np.uint32], NDArray[np.uint32], float]:
        """What the core takes."""
        codes, scales = (np.ascontiguousarray(tiles).reshape(len(tiles), tiles.shape[1] * _TILE_ROWS) for tiles in (self.code_tiles, self.scale_tiles))
        return self.format, self.shape[0], codes, scales, self.tensor_scale

    def _title(self) -> str:
        return f"PrepackedMatrix {self.format}, {self.shape[0]} x {self.shape[1]}"

    def _rows(self) -> list[tuple[str, object]]:
        return [("size", format_bytes(self.nbytes)), ("tensor scale", self.tensor_scale), ("rotation", repr(self.rotation)), ("activations", "none" if self.activations is None else self.activations.format)]


def prepack(q: QuantizedMatrix, *, threads: int | None = None) -> PrepackedMatrix:
    """``q`` for many products with few tokens: :func:`matmul` then reads it from the first byte to the last, a row a lane, and turns nothing.

    One to four tokens gain most, 1.3 to 2.2 times the speed, more of them a twentieth or nothing. It takes about as long as three products of one token, and the same memory once more where ``q`` is kept; a matrix
    whose rows are no multiple of 32 takes that of the next.

    Raises
    ------
    TypeError : no QuantizedMatrix.
    """
    if not isinstance(q, QuantizedMatrix):
        raise TypeError(f"q is {type(q).__name__}; it must be a QuantizedMatrix")
    codes, scales = (_aligned(shape) for shape in _tile_shapes(q.format, (q.shape[0], q.shape[1] + q.padding)))
    tiles = PrepackedMatrix(q.format, q.shape, codes, scales, q.tensor_scale, q.rotation, q.activations, q.padding)
    _, _, flat_codes, flat_scales, _ = tiles.core_arrays()
    _core.make_tiles(q.core_arrays(), flat_codes, flat_scales, as_threads(threads))
    return tiles


def _tile_shapes(format: str, shape: tuple[int, int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of codes and scales."""
    rows, cols = shape
    tiles, groups = -(-rows // _TILE_ROWS), cols // block_format(format).group_size
    return (tiles, cols // _CODES_A_WORD, _TILE_ROWS), (tiles, -(-groups // _SCALES_A_WORD), _TILE_ROWS)


def _aligned(shape: tuple[int, int, int]) -> NDArray[np.uint32]:
    """An empty array that begins with a cache line, so that a vector reads one and not two."""
    size = shape[0] * shape[1] * shape[2]
    memory = np.empty(size + _CACHE_LINE // 4, np.uint32)
    first = -memory.ctypes.data % _CACHE_LINE // 4
    return memory[first : first + size].reshape(shape)
