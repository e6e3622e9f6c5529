"""A tensor as it lies on disk: a safetensors dtype name and the bits.

NumPy has no bfloat16 and no 8- or 4-bit float, and the safetensors library cannot hand all of them to a NumPy user.
So a tensor stays what the file says it is, bits under a name, and becomes float32 values only when somebody asks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..arrays import widen_bfloat16

# name -> (dtype of the bits, name of the NumPy or ml_dtypes type with these values). Narrowest first, in the order of
# the safetensors library's own enumeration: write_file sorts by it, which aligns every tensor and gives the library's bytes.
_TYPES = {
    "BOOL": ("?", "bool"),
    "F4": ("<u1", "float4_e2m1fn"),
    "U8": ("<u1", "uint8"),
    "I8": ("<i1", "int8"),
    "F8_E5M2": ("<u1", "float8_e5m2"),
    "F8_E4M3": ("<u1", "float8_e4m3fn"),
    "F8_E8M0": ("<u1", "float8_e8m0fnu"),
    "I16": ("<i2", "int16"),
    "U16": ("<u2", "uint16"),
    "F16": ("<f2", "float16"),
    "BF16": ("<u2", "bfloat16"),
    "I32": ("<i4", "int32"),
    "U32": ("<u4", "uint32"),
    "F32": ("<f4", "float32"),
    "C64": ("<c8", "complex64"),
    "F64": ("<f8", "float64"),
    "I64": ("<i8", "int64"),
    "U64": ("<u8", "uint64"),
}
BITS_DTYPE = {name: np.dtype(bits) for name, (bits, _) in _TYPES.items()}
_STORED_NAME = {values: name for name, (_, values) in _TYPES.items()}


def bits_shape(dtype: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the array of bits that holds ``shape`` elements of ``dtype``: the same, but F4 keeps two codes in a byte.

    Raises
    ------
    ValueError : an F4 shape whose last axis does not fill whole bytes; a sentence that begins with "has shape".
    """
    if dtype != "F4":
        return tuple(shape)
    if not shape or shape[-1] % 2:
        raise ValueError(f"has shape {tuple(shape)}; F4 keeps two codes in a byte, so its last axis must be even")
    return (*shape[:-1], shape[-1] // 2)


def _minifloat_values(exponent_bits: int, mantissa_bits: int) -> NDArray[np.float32]:
    """float32 value of every pattern sign | exponent | mantissa with bias 2**(exponent_bits - 1) - 1, no special patterns."""
    sign, exponent, mantissa = np.ogrid[0:2, 0 : 2**exponent_bits, 0 : 2**mantissa_bits]
    significand = mantissa + (exponent > 0) * 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    magnitude = np.ldexp(significand, np.maximum(exponent, 1) - bias - mantissa_bits)
    values: NDArray[np.float32] = np.where(sign, -magnitude, magnitude).astype(np.float32)
    return values.reshape(-1)


def _values_of_bytes() -> dict[str, NDArray[np.float32]]:
    """dtype -> table of 256 float32 values (OCP 8-bit floats and Microscaling v1.0); for F4 (256, 2), low nibble first."""
    byte = np.arange(256)
    e4m3 = _minifloat_values(4, 3)
    e4m3[[0x7F, 0xFF]] = np.nan
    e8m0 = np.ldexp(1.0, byte - 127)
    e8m0[0xFF] = np.nan
    return {
        "F8_E4M3": e4m3,
        # E5M2 is the upper half of an IEEE float16, infinities and NaNs included.
        "F8_E5M2": (byte << 8).astype(np.uint16).view(np.float16).astype(np.float32),
        "F8_E8M0": e8m0.astype(np.float32),
        "F4": _minifloat_values(2, 1)[np.stack([byte & 0xF, byte >> 4], axis=1)],
    }


_VALUES_OF_BYTE = _values_of_bytes()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class StoredTensor:
    """Bits under a safetensors dtype name. Built by ``of`` or ``from_bits``; ``np.asarray`` gives the values.

    Attributes
    ----------
    dtype : one of BOOL, F4, U8, I8, F8_E5M2, F8_E4M3, F8_E8M0, I16, U16, F16, BF16, I32, U32, F32, C64, F64, I64, U64.
    bits : read-only array, little-endian, any strides, shares memory with what it was built from. The type itself where NumPy
        has it; BF16 is uint16; F8_* are uint8; F4 is uint8 with shape (..., n / 2), the even element in the low nibble.
    shape : elements per axis, as in a file's header; differs from ``bits.shape`` for F4 alone, where the last axis is n.
    nbytes : size of the data in a file.
    """

    dtype: str
    bits: NDArray[Any]

    @classmethod
    def of(cls, array: "ArrayLike | StoredTensor") -> "StoredTensor":
        """Take an array of a NumPy or ml_dtypes type, or a StoredTensor as it is. Copies only big-endian and float4 arrays.

        Raises
        ------
        ValueError : a dtype that safetensors has no name for, or float4 (one code per byte in ml_dtypes) with an odd last axis.
        """
        if isinstance(array, cls):
            return array
        array = np.asarray(array)
        dtype = _STORED_NAME.get(array.dtype.name)
        if dtype is None:
            raise ValueError(f"an array of dtype {array.dtype} cannot be stored; the dtypes that can are {', '.join(_STORED_NAME)}")
        if dtype == "F4":
            try:
                bits_shape(dtype, array.shape)
            except ValueError as error:
                raise ValueError(f"a float4_e2m1fn array {error}") from None
            codes = array.view(np.uint8) & 0xF
            return cls.from_bits(dtype, codes[..., 0::2] | codes[..., 1::2] << 4)
        little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
        return cls.from_bits(dtype, little_endian.view(BITS_DTYPE[dtype]))

    @classmethod
    def from_bits(cls, dtype: str, bits: ArrayLike) -> "StoredTensor":
        """Name bits: ``from_bits("BF16", uint16_array)``; for F4 a uint8 array of packed pairs with at least one axis.

        Raises
        ------
        ValueError : unknown name, or bits of another dtype than the name needs.
        """
        if dtype not in BITS_DTYPE:
            raise ValueError(f"unknown safetensors dtype {dtype!r}; the known ones are {', '.join(BITS_DTYPE)}")
        bits = np.asarray(bits)
        if bits.dtype.newbyteorder("<") != BITS_DTYPE[dtype]:
            raise ValueError(f"the bits of {dtype} are {BITS_DTYPE[dtype].name}, got {bits.dtype.name}")
        if dtype == "F4" and bits.ndim == 0:
            raise ValueError("the bits of F4 need at least one axis, got a scalar")
        view = bits.astype(BITS_DTYPE[dtype], copy=False).view()
        view.flags.writeable = False
        return cls(dtype, view)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.bits.shape[:-1], 2 * self.bits.shape[-1]) if self.dtype == "F4" else self.bits.shape

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """The values: NumPy's own types as they are (read-only, no copy), the others widened exactly to float32."""
        values = self._values()
        if dtype is not None and values.dtype != dtype:
            values = values.astype(dtype)
        shared = values is self.bits
        if copy is False and not shared:
            raise ValueError(f"the values of {self!r} as {values.dtype} need a copy, which copy=False forbids")
        return values.copy() if copy and shared else values

    def _values(self) -> NDArray[Any]:
        if self.dtype == "BF16":
            return widen_bfloat16(self.bits)
        if self.dtype in _VALUES_OF_BYTE:
            return np.asarray(_VALUES_OF_BYTE[self.dtype][self.bits]).reshape(self.shape)
        return self.bits

    def __repr__(self) -> str:
        return f"StoredTensor({self.dtype}, {self.shape}, {self.nbytes} bytes)"
