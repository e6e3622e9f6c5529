"""The door: every array, name and count that a user hands in is checked here once, and refused in a full sentence."""

import numbers
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core

_T = TypeVar("_T")
_THREADS_TOLD = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip().lstrip("0").isdigit()  # read by OpenMP when the core was loaded, and not again; what is no number it passes over
FLOAT_DTYPES = "float32, float64, float16, bfloat16 (ml_dtypes, or uint16 bits with dtype=\"bfloat16\")"


def choose(what: str, value: _T, known: Sequence[object]) -> _T:
    """Return ``value`` if it is one of ``known``, else raise ValueError that lists them."""
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(str(k) for k in known)}")
    return value


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put the place, such as a file and a layer, before the message of a ValueError or TypeError raised in the block, which speaks of arguments."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{where}: {error}") from None


def default_threads() -> int:
    """What ``threads=None`` means: OMP_NUM_THREADS where it was set when the package was imported; else 1 in a worker process of multiprocessing or concurrent.futures, where the pool
    is what keeps the cores busy; else one thread a core."""
    processes = sys.modules.get("multiprocessing.process")  # a worker has imported it
    if not _THREADS_TOLD and processes is not None and processes.parent_process() is not None:
        return 1
    return int(_core.build_info()["threads"])


def as_threads(threads: int | None) -> int:
    """Number of threads for the core."""
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or threads < 1:
        raise ValueError(f"threads is {threads!r}; it must be None or an integer from 1 on")
    return min(int(threads), 1024)  # no result depends on it, and libgomp ends the process when it cannot start a team


def widen_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 bits, of any shape."""
    wide = bits.astype(np.uint32)
    np.left_shift(wide, np.uint32(16), out=wide)  # in place: a second array would be as large as the values; by an int NumPy 1 would widen what has no dimensions
    return wide.view(np.float32)


def _widen(array: ArrayLike, name: str, dtype: str | None) -> NDArray[np.float32]:
    if dtype is not None:
        choose("dtype", dtype, ("bfloat16",))
        bits = np.asarray(array)
        if bits.dtype.newbyteorder("=") != np.uint16:
            raise TypeError(f'{name} has dtype {bits.dtype}; dtype="bfloat16" takes the bits as uint16')
        return widen_bfloat16(bits)
    try:
        values = np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a torch tensor that requires grad
        raise TypeError(f"{name} ({type(array).__name__}) does not convert to a numpy array: {error}") from error
    if values.dtype == np.float32:
        return values
    if values.dtype.kind == "f" and values.dtype.itemsize in (2, 4, 8) or values.dtype.name == "bfloat16":
        with np.errstate(over="ignore"):  # what overflows is refused below, with its place
            return values.astype(np.float32)
    raise TypeError(f"{name} has dtype {values.dtype}; allowed: {FLOAT_DTYPES}")


def as_float32(array: ArrayLike, name: str, *, rank: int | None = None, dtype: str | None = None, threads: int | None = None, finite: bool = True) -> NDArray[np.float32]:
    """Widen an array to finite float32 with adjacent columns; no copy where it already is that.

    Parameters
    ----------
    array : anything numpy takes, of float32, float64, float16 or bfloat16; any strides.
    rank : the number of axes it must have; None for one or more.
    dtype : "bfloat16" where ``array`` holds bfloat16 bits as uint16.
    finite : False leaves it to the caller to find what is not finite on the way, and to :func:`refuse_nonfinite` it: one pass over memory less.

    Raises
    ------
    TypeError : another dtype. ValueError : wrong rank, empty, or not finite in float32 (with the first such position).
    """
    values = _widen(array, name, dtype)
    if rank is not None and values.ndim != rank:
        raise ValueError(f"{name} has rank {values.ndim} (shape {values.shape}); expected rank {rank}" + (", (rows, cols)" if rank == 2 else ""))
    if values.ndim == 0 or values.size == 0:
        raise ValueError(f"{name} is empty: its shape is {values.shape}")
    matrix = values if values.ndim == 2 else values.reshape(-1, values.shape[-1])
    if (matrix.shape[1] > 1 and matrix.strides[1] != 4) or matrix.strides[0] % 4 or not matrix.flags.aligned:
        matrix = matrix.copy()  # ascontiguousarray would leave an unaligned array where it is
    widened = matrix if values.ndim == 2 else matrix.reshape(values.shape)
    if finite:
        refuse_nonfinite(widened, _core.first_nonfinite(matrix, as_threads(threads)), name)
    return widened


def refuse_nonfinite(values: NDArray[np.float32], position: int, name: str) -> None:
    """Raise ValueError that names the value at a row-major position; none where it is -1."""
    if position >= 0:
        where = tuple(int(i) for i in np.unravel_index(position, values.shape))
        place = f"row {where[0]}, column {where[1]}" if len(where) == 2 else f"index {where}"
        raise ValueError(f"{name} is {values[where]} at {place}; every value must be finite in float32")


def as_output(out: NDArray[Any], shape: tuple[int, ...], name: str = "out", dtype: type = np.float32) -> NDArray[Any]:
    """Check an array that results are written into: float32 unless said otherwise, of that shape, writeable, adjacent columns."""
    if not isinstance(out, np.ndarray) or out.dtype != dtype or out.shape != shape:
        got = f"{out.dtype} of shape {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"{name} is {got}; it must be a {np.dtype(dtype)} array of shape {shape}")
    if not out.flags.writeable:
        raise ValueError(f"{name} is read-only")
    size = out.itemsize
    if out.size and (out.ndim != 2 and not out.flags.c_contiguous or out.ndim == 2 and (out.strides[1] != size or out.strides[0] % size)):
        raise ValueError(f"{name} has strides {out.strides} bytes; its columns must be adjacent")
    if not out.flags.aligned:
        raise ValueError(f"{name} is not aligned to its {size}-byte elements")
    return out


def as_number(value: float, name: str) -> float:
    """A real number as float; TypeError for whatever else float() would make one of (text, True, arrays)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; it must be a real number")
    return float(value)


def as_scale(value: float, name: str) -> float:
    """A positive finite number as float32."""
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused as that
        number = np.float32(as_number(value, name))
    if not (np.isfinite(number) and number > 0):
        raise ValueError(f"{name} is {value!r}; it must be a positive finite number in float32")
    return float(number)


def pad_columns(x: Any, padding: int) -> Any:
    """An array with so many columns of zeros behind its own, itself where that is 0; bfloat16 bits stay such."""
    return np.pad(x, [(0, 0)] * (np.ndim(x) - 1) + [(0, padding)]) if padding else x


def as_square(hessian: ArrayLike, cols: int | None, name: str = "hessian") -> Any:
    """A Hessian itself, whose matrix is made for whoever asks, anything else as the array that NumPy makes of it; ``cols`` None takes any size. ValueError where it is not (cols, cols), TypeError where it
    holds no real numbers."""
    values: Any = hessian
    shape: tuple[int, ...]
    if hasattr(values, "as_array"):
        shape = (values.cols, values.cols)
    else:
        try:
            values = np.asarray(hessian)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} ({type(hessian).__name__}) does not convert to a numpy array: {error}") from error
        if values.dtype.kind not in "fiu" and values.dtype.name != "bfloat16":
            raise TypeError(f"{name} has dtype {values.dtype}; allowed: real numbers")
        shape = values.shape
        if values.ndim != 2 or shape[0] != shape[1] or values.size == 0:
            raise ValueError(f"{name} has shape {shape}; it must be square, (cols, cols)")
    if cols is not None and shape[0] != cols:
        raise ValueError(f"{name} has shape {shape}; a weight of {cols} columns needs ({cols}, {cols})")
    return values


def as_symmetric(hessian: ArrayLike, cols: int | None, name: str = "hessian", *, copy: bool = True, out: NDArray[np.float64] | None = None, threads: int | None = None) -> NDArray[np.float64]:
    """A fresh float64 copy of a Hessian, exactly symmetric, or ``out``, of its shape, filled with one; ``cols`` None takes any size. Without ``copy`` and ``out`` an array that is float64 and exactly
    symmetric comes back as it is, to be read only.

    Raises ValueError where it is not square, not (cols, cols), not finite, not symmetric (|H - Hᵀ| <= 1e-5 max|H|), has a negative diagonal entry or a zero one beside others that are none.
    """
    values = as_square(hessian, cols, name)
    if out is not None:
        as_output(out, (len(values),) * 2 if isinstance(values, np.ndarray) else (values.cols,) * 2, dtype=np.float64)
        if isinstance(values, np.ndarray) and np.may_share_memory(out, values):
            raise ValueError(f"out overlaps {name}, which is left as it is")
    if not isinstance(values, np.ndarray):
        given = matrix = values = values.as_array(out=out, threads=threads)
    else:
        own = values.dtype == np.float64 and values.flags.c_contiguous and values.flags.aligned  # the caller's
        if own:
            given, matrix = values, out if out is not None else np.empty_like(values) if copy else None
        else:  # widened where it will stay
            given = matrix = np.empty(values.shape) if out is None else out
            np.copyto(given, values)
    nonfinite, largest, apart, row, col = _core.make_symmetric(given, matrix, as_threads(threads))
    if nonfinite >= 0:
        row, col = divmod(nonfinite, len(values))
        raise ValueError(f"{name} is {float(values[row, col])} at row {row}, column {col}; every entry must be finite")
    if not apart <= 1e-5 * largest:
        raise ValueError(f"{name} is not symmetric: entries ({row}, {col}) and ({col}, {row}) are {values[row, col]:.6g} and {values[col, row]:.6g}; allowed is a difference of 1e-5 of the largest entry")
    if matrix is None:
        if apart == 0:
            matrix = given.view()
            matrix.flags.writeable = False
        else:
            matrix = np.empty_like(given)
            _core.make_symmetric(given, matrix, as_threads(threads))
    diagonal = matrix.diagonal()
    if not diagonal.min() >= 0:
        row = int(diagonal.argmin())
        raise ValueError(f"{name} has the negative diagonal entry {diagonal[row]:.6g} at column {row}; a second moment has none")
    for row in map(int, np.flatnonzero(diagonal == 0)):
        beside = values[row].astype(np.float64)
        col = int(np.abs(beside).argmax())
        if not abs(beside[col]) <= 1e-5 * largest:  # small ones may be what is left of a diagonal that underflowed
            raise ValueError(f"{name} has 0 on its diagonal at column {row}, but {beside[col]:.6g} beside it; a second moment's column is then all zero")
    return matrix
