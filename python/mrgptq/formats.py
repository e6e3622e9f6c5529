"""The 4-bit block formats and the element types they are made of."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .arrays import choose

MX_RULES = ("floor", "ceil", "even", "four-thirds")
"""How a magnitude becomes a power of two: OCP's floor; the smallest that never clips; floor of the magnitude rounded to one mantissa bit; (4/3) 2^e, which never clips."""

SCALE_SEARCHES = {"nvfp4": ("absmax", "fpquant_mse", "mse", "four_over_six"), "mxfp4": ("absmax", "fpquant_mse", "mse", "quest")}
"""How a group's scale is found from the group alone, see ``quantize``."""


@dataclass(frozen=True)
class BlockFormat:
    """A 4-bit format as data: ``group_size`` columns share one stored scale of 8 bits."""

    name: str
    group_size: int
    scale_dtype: str

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes on disk: its code and its share of the group's scale; a tensor scale adds 32 bits a tensor."""
        return 4 + 8 / self.group_size


FORMATS = {
    "mxfp4": BlockFormat("mxfp4", _core.group_size("mxfp4"), "F8_E8M0"),
    "nvfp4": BlockFormat("nvfp4", _core.group_size("nvfp4"), "F8_E4M3"),
}
"""{name: BlockFormat} of the two."""


def block_format(name: str) -> BlockFormat:
    """The :class:`BlockFormat` of that name; ValueError lists the known ones."""
    return FORMATS[choose("format", name, tuple(FORMATS))]


def _floats(x: ArrayLike) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # infinity saturates like what it stands for
        values = np.asarray(x, dtype=np.float32)
    if np.isnan(values).any():
        raise ValueError("x holds NaN, which no code stands for")
    return values


def encode_e2m1(x: ArrayLike) -> NDArray[np.uint8]:
    """Codes 0 … 15 (uint8) of the nearest E2M1 values, ties to the even code, beyond ±6 saturated; what rounds to zero gets code 0. x: floats without NaN, any shape, rounded to float32 first."""
    return np.asarray(_core.encode_e2m1(_floats(x)), dtype=np.uint8)


def decode_e2m1(codes: ArrayLike) -> NDArray[np.float32]:
    """E2M1 codes (uint8, the low four bits count) as float32."""
    return np.asarray(_core.decode_e2m1(np.asarray(codes, dtype=np.uint8)), dtype=np.float32)


def encode_e4m3(x: ArrayLike) -> NDArray[np.uint8]:
    """Bits (uint8) of the nearest E4M3 values ("fn" kind), ties to even, beyond ±448 saturated. x: floats without NaN, any shape, rounded to float32 first."""
    return np.asarray(_core.encode_e4m3(_floats(x)), dtype=np.uint8)


def decode_e4m3(bits: ArrayLike) -> NDArray[np.float32]:
    """E4M3 bits (uint8) as float32; 0x7F and 0xFF are NaN."""
    return np.asarray(_core.decode_e4m3(np.asarray(bits, dtype=np.uint8)), dtype=np.float32)


def encode_e8m0(x: ArrayLike) -> NDArray[np.uint8]:
    """Bytes of the powers of two at or below x, clamped to 2^-127 … 2^127. x: positive floats, any shape."""
    values = _floats(x)
    if not (values > 0).all():
        raise ValueError("x holds a number that is not positive; E8M0 has neither zero nor sign")
    return np.asarray(_core.encode_e8m0(values), dtype=np.uint8)


def decode_e8m0(bits: ArrayLike) -> NDArray[np.float32]:
    """E8M0 bytes as float32 powers of two, 2^(byte - 127); 255 is NaN."""
    return np.asarray(_core.decode_e8m0(np.asarray(bits, dtype=np.uint8)), dtype=np.float32)
