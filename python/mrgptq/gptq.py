"""The second moment of a layer's inputs and the factor GPTQ draws from it."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _core
from .arrays import as_float32, as_number, as_output, as_square, as_threads, choose, pad_columns
from .codecs import PackedMatrix, Turn
from .rotations import Hadamard, Identity, Rotation

ORDERS = ("natural", "activation", "group")
"""The columns' visiting order: left to right; by descending diagonal of H; whole groups by the descending sum of their diagonals, inside a group likewise. Nothing is stored: groups and
scales stay where they are."""
PRECISIONS = ("float32", "float64")
OUTPUT_DAMPING = 0.05
"""Of an output Hessian, relative to its mean diagonal; between 0.01 and 0.2 the divergence moves by 1 % (bench/accuracy.md)."""
OUTPUT_HESSIAN_BYTES = 4 << 30
"""What the output Hessians of the blocks that share a backward pass may take together; a single block's may take more."""


class Hessian:
    """The running second moment H = X^T X / tokens of a layer's inputs, or of the gradients at its outputs.

    Tokens are gathered into panels of 256, counted from the start of the stream; a panel's product is float32, the sum over panels float64. So the bytes do
    not depend on how the stream was cut into batches, nor on the number of threads. Python threads that share one take turns.

    Parameters
    ----------
    cols : int, the layer's in_features (out_features for gradients).

    Examples
    --------
    >>> h = Hessian(4)
    >>> h.update(np.ones((3, 4), dtype=np.float32))
    >>> h.tokens, float(h.matrix[0, 1])
    (3, 1.0)
    """

    __slots__ = ("_sum",)

    def __init__(self, cols: int) -> None:
        if isinstance(cols, bool) or not isinstance(cols, (int, np.integer)) or cols < 1:
            raise ValueError(f"cols is {cols!r}; it must be an integer from 1 on")
        self._sum = _core.HessianSum(int(cols))

    @classmethod
    def from_state(cls, triangle: NDArray[np.float64], panel: NDArray[np.float32], tokens: int) -> "Hessian":
        """The Hessian whose :meth:`state` that was; it goes on where that one stood, byte for byte. ValueError where the three do not fit each other or hold what is not finite."""
        for name, array, rank, dtype in (("triangle", triangle, 1, np.float64), ("panel", panel, 2, np.float32)):
            if array.ndim != rank or array.dtype != dtype:
                raise ValueError(f"{name} is {array.dtype} of rank {array.ndim}; a Hessian's is {np.dtype(dtype)} of rank {rank}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds what is not finite; a Hessian never does")
        cols = panel.shape[1]
        if triangle.size != cols * (cols + 1) // 2:
            raise ValueError(f"triangle has {triangle.size} numbers; the lower triangle of {cols} columns has {cols * (cols + 1) // 2}")
        if (triangle[np.cumsum(np.arange(1, cols + 1)) - 1] < 0).any():
            raise ValueError("triangle has a negative diagonal entry; a second moment has none")
        made = cls(cols)
        made._sum = _core.HessianSum(np.ascontiguousarray(triangle).reshape(1, -1), np.ascontiguousarray(panel), int(tokens))
        return made

    def state(self) -> tuple[NDArray[np.float64], NDArray[np.float32], int]:
        """All there is to it, to be stored: the sum over whole panels, its lower triangle row by row, (cols (cols + 1) / 2,) float64; the tokens of the panel under way, (0 ... 255, cols) float32; how many tokens in all."""
        triangle, panel = self._sum.state()
        return triangle.reshape(-1), panel, self.tokens

    def padded(self, padding: int) -> "Hessian":
        """The second moment of the same inputs with so many columns of zeros behind their own."""
        triangle, panel, tokens = self.state()
        cols = self.cols + padding
        return Hessian.from_state(np.pad(triangle, (0, cols * (cols + 1) // 2 - triangle.size)), pad_columns(panel, padding), tokens)

    @property
    def cols(self) -> int:
        """Number of columns."""
        return self._sum.cols

    @property
    def tokens(self) -> int:
        """Number of rows of X seen so far."""
        return self._sum.tokens

    @property
    def matrix(self) -> NDArray[np.float64]:
        """H as a fresh (cols, cols) float64 array; all zero where no token was seen."""
        return self.as_array()

    def as_array(self, *, out: NDArray[np.float64] | None = None, threads: int | None = None) -> NDArray[np.float64]:
        """:attr:`matrix`, by so many threads; in ``out``, a (cols, cols) float64 array whose columns are adjacent, where it is given."""
        matrix = np.empty((self.cols, self.cols)) if out is None else as_output(out, (self.cols, self.cols), dtype=np.float64)
        self._sum.matrix(matrix, as_threads(threads))
        return matrix

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("a Hessian is not stored as its matrix; a copy is needed")
        return self.matrix if dtype is None else self.matrix.astype(dtype, copy=False)

    def update(self, x: ArrayLike, *, dtype: str | None = None, threads: int | None = None) -> None:
        """Add a batch: ``x`` (..., cols), float32 / float16 / bfloat16 / float64, finite; every leading axis counts tokens. An empty batch adds nothing."""
        shape: tuple[int, ...] = getattr(x, "shape", ())
        if 0 in shape and shape[-1] == self.cols:
            return
        values = as_float32(x, "x", dtype=dtype, threads=threads)
        if values.shape[-1] != self.cols:
            raise ValueError(f"x has {values.shape[-1]} columns; this Hessian has {self.cols}")
        self._sum.update(values if values.ndim == 2 else values.reshape(-1, self.cols), as_threads(threads))

    def merge(self, other: "Hessian", *, threads: int | None = None) -> None:
        """Add the tokens that another Hessian of as many columns saw; ``other`` is left as it is."""
        if not isinstance(other, Hessian):
            raise TypeError(f"other is {type(other).__name__}; only a Hessian knows how many tokens it saw")
        if other is self:
            raise ValueError("a Hessian cannot be merged into itself")
        if other.cols != self.cols:
            raise ValueError(f"other has {other.cols} columns; this Hessian has {self.cols}")
        self._sum.merge(other._sum, as_threads(threads))

    def __repr__(self) -> str:
        return f"Hessian({self.cols} columns, {self.tokens} tokens)"


class Factor:
    """The Cholesky factor of a rotated Hessian with its visiting order, shared by all layers that read the same inputs. Eight bytes for each pair of columns hold both the factor and the
    rotated Hessian; the given one is needed no longer.

    Parameters
    ----------
    hessian : Hessian or (cols, cols) array, symmetric, finite, diagonal >= 0.
    rotation : Identity() or Hadamard(k), applied to both sides.
    order : "activation" (descending diagonal of the rotated H), "group" (whole groups by the sum of theirs; searched scales and refinement need it) or "natural".
    group_size : columns in a group, for the order "group".
    damping : >= 0; λ relative to the mean of the live diagonal. If the factorisation fails it rises tenfold at a time (from 0.01 where it was 0) up to 1.
    precision : of the products. "float32" takes two thirds of the time from 4096 columns on; the factor is that of a matrix that differs from H by a few float32 roundings of sqrt(H[i, i] H[j, j]), as H does itself when a
        :class:`Hessian` summed it. Where that would blur a pivot, one below 6e-5 of its diagonal, the products are float64 nevertheless.

    Attributes
    ----------
    hessian : (cols, cols) float64, rotated; made anew whenever it is asked for. Columns that no input reached are zero.
    damping : the one used. damping_asked : the one given. dead_columns : int.
    usable : False where even damping 1 did not help; layers are then rounded plainly and say so.
    tokens : int, or None for a plain array. seconds : wall time.
    """

    def __init__(self, hessian: ArrayLike, *, rotation: Rotation | None = None, order: str = "activation", damping: float = 0.01, group_size: int | None = None, precision: str = "float64", threads: int | None = None) -> None:
        start = time.perf_counter()
        self.rotation = Identity() if rotation is None else rotation
        if not isinstance(self.rotation, (Identity, Hadamard)):
            raise TypeError(f"rotation is {rotation!r}; it must be None, Identity() or Hadamard(block_size)")
        self.order_name = choose("order", order, ORDERS)
        self.damping_asked = as_damping(damping)
        self.precision = choose("precision", precision, PRECISIONS)
        self.tokens = hessian.tokens if isinstance(hessian, Hessian) else None
        given = as_square(hessian, None)
        self.cols: int = given.cols if isinstance(given, Hessian) else len(given)
        """Number of columns."""
        self.group_size = self._group_size(group_size)
        room = _core.CholeskyFactor.room(self.cols)
        self.rotation.apply_hessian(given, out=room, threads=threads)
        self.core = _core.CholeskyFactor(room, order, self.damping_asked, self.group_size or 1, self.precision, as_threads(threads))
        self.seconds = time.perf_counter() - start

    def _group_size(self, group_size: int | None) -> int | None:
        """What the order needs: the columns of a group for "group", None for the others."""
        if self.order_name != "group":
            return None
        if not isinstance(group_size, (int, np.integer)) or isinstance(group_size, bool) or group_size < 1:
            raise ValueError(f'group_size is {group_size!r}; the order "group" needs the number of columns in a group')
        if self.cols % group_size:
            raise ValueError(f"hessian has {self.cols} columns; groups of {group_size} do not divide them")
        return int(group_size)

    @property
    def hessian(self) -> NDArray[np.float64]:
        """(cols, cols) float64, rotated: a fresh array."""
        return self.core.second_moment().matrix(as_threads(None))

    @property
    def order(self) -> NDArray[np.int64]:
        """(cols,) int64: the columns in the order they are visited."""
        return self.core.order

    @property
    def damping(self) -> float:
        """The relative damping that was used."""
        return self.core.damping

    @property
    def dead_columns(self) -> int:
        """How many columns no input reached."""
        return self.core.dead_columns

    @property
    def usable(self) -> bool:
        """Whether a damping was found at which H could be factorised."""
        return self.core.usable

    def __repr__(self) -> str:
        return f"Factor({self.cols} columns, {self.rotation}, order {self.order_name}, damping {self.damping:g}, {self.dead_columns} dead{'' if self.usable else ', not usable'})"


def as_damping(damping: float) -> float:
    """A finite float >= 0, or ValueError; TypeError for what is not a number."""
    value = as_number(damping, "damping")
    if not (np.isfinite(value) and value >= 0):
        raise ValueError(f"damping is {damping!r}; it must be a finite number from 0 on")
    return value


def output_errors(
    weight: NDArray[np.float32], turn: Turn, answers: Sequence[PackedMatrix], outputs: _core.SecondMoment, inputs: _core.SecondMoment, *, precision: str = "float64", threads: int | None = None
) -> tuple[float | None, ...]:
    """tr(A E H E^T) / tr(A W H W^T) of E = W - Q for each answer Q, products in ``precision``; None where the latter is 0. weight W (rows, cols) float32, turned, outputs A (rows, rows), inputs H (cols, cols)."""
    energy = _core.coupled_form(weight, turn, None, outputs, inputs, precision, as_threads(threads))
    return tuple(_core.coupled_form(weight, turn, answer, outputs, inputs, precision, as_threads(threads)) / energy if energy > 0 else None for answer in answers)


def backward_passes(rows_by_block: Sequence[Sequence[int]]) -> list[list[int]]:
    """Blocks, by index, that share a backward pass: as many in a row as their output Hessians, float64, fit into OUTPUT_HESSIAN_BYTES. ``rows_by_block``: out_features of each block's layers."""
    passes: list[list[int]] = []
    held = 0
    for index, rows in enumerate(rows_by_block):
        size = sum(8 * count**2 for count in rows)
        if not passes or held + size > OUTPUT_HESSIAN_BYTES:
            passes.append([])
            held = 0
        passes[-1].append(index)
        held += size
    return passes
