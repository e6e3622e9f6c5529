"""Rotations: orthogonal maps T on the columns of a matrix, under which x W^T = (x T) (W T)^T. All of them are block-diagonal."""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .arrays import as_float32, as_output, as_symmetric, as_threads, refuse_nonfinite


class Identity:
    """The rotation that leaves everything as it is; ``block_size`` is None."""

    block_size: int | None = None

    def apply(self, x: ArrayLike, out: NDArray[np.float32] | None = None, *, dtype: str | None = None, threads: int | None = None) -> NDArray[np.float32]:
        """A float32 copy of ``x`` (..., cols), in ``out`` where given."""
        values = as_float32(x, "x", dtype=dtype, threads=threads)
        if out is None:
            return values.copy()
        np.copyto(as_output(out, values.shape), values)
        return out

    apply_inverse = apply

    def apply_hessian(self, hessian: ArrayLike, *, out: NDArray[np.float64] | None = None, threads: int | None = None) -> NDArray[np.float64]:
        """A float64 copy of ``hessian`` (cols, cols), in ``out`` where it is given."""
        return as_symmetric(hessian, None, out=out, threads=threads)

    def apply_both(self, matrix: NDArray[Any], *, threads: int | None = None) -> NDArray[np.float64]:
        """``matrix`` (cols, cols) itself where it is float64 and its columns are adjacent, else a copy that is."""
        as_threads(threads)
        return np.ascontiguousarray(matrix, dtype=np.float64)

    @property
    def dual(self) -> "Identity":
        """Itself."""
        return self

    def check_columns(self, cols: int, name: str = "x") -> None:
        """Any number of columns will do."""

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return "Identity()"


class Hadamard:
    """Block Hadamard rotation: every ``block_size`` columns are multiplied by the Sylvester matrix divided by sqrt(block_size).

    The matrix is symmetric and its own inverse. Orthogonal to float32 rounding: about 1e-7 sqrt(log2(block_size)) relative.

    Parameters
    ----------
    block_size : int, a power of two from 2 on. The paper uses 16 for NVFP4 and 32 for MXFP4.

    Raises
    ------
    ValueError : "block_size is 12; it must be a power of two from 2 on".

    References
    ----------
    Egiazarian et al. 2025 (arXiv 2509.23202), section 3.
    """

    __slots__ = ("block_size",)

    def __init__(self, block_size: int) -> None:
        if isinstance(block_size, bool) or not isinstance(block_size, (int, np.integer)) or block_size < 2 or block_size & (block_size - 1):
            raise ValueError(f"block_size is {block_size!r}; it must be a power of two from 2 on")
        self.block_size = int(block_size)

    @property
    def matrix(self) -> NDArray[np.float32]:
        """One block, (block_size, block_size) float32, orthogonal and symmetric."""
        return self.apply(np.eye(self.block_size, dtype=np.float32))

    @property
    def dual(self) -> "Hadamard":
        """Itself: it is orthogonal."""
        return self

    def check_columns(self, cols: int, name: str = "x") -> None:
        """Raise ValueError unless the block size divides ``cols``."""
        _check_blocks(cols, self.block_size, name)

    def apply(self, x: ArrayLike, out: NDArray[np.float32] | None = None, *, dtype: str | None = None, threads: int | None = None) -> NDArray[np.float32]:
        """x T for weights and activations.

        Parameters
        ----------
        x : (..., cols) array, float32 / float16 / bfloat16 / float64, finite; cols a multiple of the block size.
        out : float32 array of x's shape to write into; ``out=x`` rotates in place.

        Returns
        -------
        float32 array of x's shape (``out`` where given). Same bytes for any number of threads and on every machine.
        """
        return _rotate(self, self.block_size, x, out, dtype, threads)

    apply_inverse = apply

    def apply_hessian(self, hessian: ArrayLike, *, out: NDArray[np.float64] | None = None, threads: int | None = None) -> NDArray[np.float64]:
        """T^T H T, (cols, cols) float64, symmetric: the second moment of the rotated inputs, in ``out`` where it is given, whose columns are adjacent. ``hessian`` is left as it is."""
        rotated = as_symmetric(hessian, None, out=out, threads=threads)
        self.check_columns(rotated.shape[0], "hessian")
        _core.rotate_hessian(rotated, self.block_size, as_threads(threads))
        return rotated

    def apply_both(self, matrix: NDArray[Any], *, threads: int | None = None) -> NDArray[np.float64]:
        """T^T M T, float64, of a (cols, cols) matrix of real numbers that need not be symmetric, such as X^T X̃: both inputs rotated. ``matrix`` is left as it is."""
        rotated = np.array(matrix, dtype=np.float64, order="C")
        self.check_columns(rotated.shape[0], "matrix")
        _core.rotate_both(rotated, self.block_size, as_threads(threads))
        return rotated

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hadamard) and other.block_size == self.block_size

    def __hash__(self) -> int:
        return hash(("Hadamard", self.block_size))

    def __repr__(self) -> str:
        return f"Hadamard({self.block_size})"


class Dense:
    """A block rotation by any matrix: every k columns are multiplied by the same (k, k) matrix T, k from 1 on.

    For activations: weights that are turned by its :attr:`dual`, which is T itself where that is orthogonal, then give the products that they gave.

    Parameters
    ----------
    matrix : (k, k) array, dtypes as in ``quantize``, finite and invertible; kept as float32.

    Raises
    ------
    ValueError : not square, not finite, or singular in float32.

    References
    ----------
    QuTLASS, whose fused kernels take a matrix at run time.
    """

    __slots__ = ("_inverse", "matrix")

    def __init__(self, matrix: ArrayLike) -> None:
        self.matrix = np.array(as_float32(matrix, "matrix", rank=2), order="C")
        if self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"matrix has shape {self.matrix.shape}; it must be square")
        wide = self.matrix.astype(np.float64)
        regular = np.linalg.cond(wide) < 1 / np.finfo(np.float32).eps
        with np.errstate(over="ignore"):
            self._inverse = np.linalg.inv(wide).astype(np.float32) if regular else np.array(np.inf, np.float32)
        if not np.isfinite(self._inverse).all():
            raise ValueError("matrix is singular in float32; no inverse could turn back what it turns")
        self.matrix.flags.writeable = self._inverse.flags.writeable = False

    @property
    def block_size(self) -> int:
        """Columns that are turned together."""
        return len(self.matrix)

    @property
    def dual(self) -> "Dense":
        """By the inverse's transpose: (x T) (w T^-T)^T = x w^T. The dual's own is this again, but for float32 rounding."""
        return Dense(self._inverse.T)

    def check_columns(self, cols: int, name: str = "x") -> None:
        """Raise ValueError unless the block size divides ``cols``."""
        _check_blocks(cols, self.block_size, name)

    def apply(self, x: ArrayLike, out: NDArray[np.float32] | None = None, *, dtype: str | None = None, threads: int | None = None) -> NDArray[np.float32]:
        """x T, arguments and result as in :meth:`Hadamard.apply`. An element is the sum of its k products in the order of T's rows, each product and each sum rounded to float32."""
        return _rotate(self, self.matrix, x, out, dtype, threads)

    def apply_inverse(self, x: ArrayLike, out: NDArray[np.float32] | None = None, *, dtype: str | None = None, threads: int | None = None) -> NDArray[np.float32]:
        """x T^-1, the inverse computed in float64 and rounded to float32."""
        return _rotate(self, self._inverse, x, out, dtype, threads)

    def apply_hessian(self, hessian: ArrayLike, *, threads: int | None = None) -> NDArray[np.float64]:
        """T^T H T, (cols, cols) float64, symmetric: the second moment of the turned inputs."""
        rotated = self.apply_both(as_symmetric(hessian, None, threads=threads))
        return (rotated + rotated.T) / 2

    def apply_both(self, matrix: NDArray[Any], *, threads: int | None = None) -> NDArray[np.float64]:
        """T^T M T, float64, of a (cols, cols) matrix of real numbers that need not be symmetric; NumPy's threads, whatever ``threads`` says."""
        as_threads(threads)
        cols, k, block = matrix.shape[0], self.block_size, self.matrix.astype(np.float64)
        self.check_columns(cols, "matrix")
        columns = (matrix.reshape(-1, k) @ block).reshape(cols, cols)
        return np.ascontiguousarray((columns.T.reshape(-1, k) @ block).reshape(cols, cols).T)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dense) and np.array_equal(other.matrix, self.matrix)

    def __hash__(self) -> int:
        return hash(("Dense", self.matrix.tobytes()))

    def __repr__(self) -> str:
        return f"Dense({self.block_size} x {self.block_size})"


Rotation = Identity | Hadamard | Dense


def _check_blocks(cols: int, block_size: int, name: str) -> None:
    if cols % block_size:
        raise ValueError(f"{name} has {cols} columns; a rotation of block size {block_size} needs a multiple of it")


def _rotate(rotation: Hadamard | Dense, turn: int | NDArray[np.float32], x: ArrayLike, out: NDArray[np.float32] | None, dtype: str | None, threads: int | None) -> NDArray[np.float32]:
    fresh = out is None
    # What is not finite is found on the way where nothing of the caller's is written before.
    values = as_float32(x, "x", dtype=dtype, threads=threads, finite=not fresh)
    rotation.check_columns(values.shape[-1])
    out = np.empty(values.shape, dtype=np.float32) if out is None else as_output(out, values.shape)
    if out is not x and np.may_share_memory(out, values):
        values = values.copy()  # a shifted overlap would read what was just written
    cols = values.shape[-1]
    to = out if out.ndim == 2 else out.reshape(-1, cols)
    refuse_nonfinite(values, _core.rotate_columns(values if values.ndim == 2 else values.reshape(-1, cols), turn, to, as_threads(threads)), "x")
    return out


def rotate_hessian(rotation: Rotation, hessian: ArrayLike, *, threads: int | None = None) -> NDArray[np.float64]:
    """``rotation.apply_hessian``, except that without a rotation the caller's own float64 array comes back, read-only, where it is exactly symmetric and stays as it is."""
    return as_symmetric(hessian, None, copy=False, threads=threads) if isinstance(rotation, Identity) else rotation.apply_hessian(hessian, threads=threads)


def rotation_of(block_size: int | None, cols: int | None = None) -> Rotation:
    """:class:`Hadamard` of that block size, :class:`Identity` for None. ``cols``: of the largest power of two in it that divides them."""
    if block_size is None:
        return Identity()
    return Hadamard(block_size if cols is None else math.gcd(block_size, cols))
