"""Scales, steps and sums worked out without the package, for the tests of scale rules."""

from fractions import Fraction

import ml_dtypes
import numpy as np

E2M1 = [Fraction(v) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
FORMATS = {"nvfp4": 16, "mxfp4": 32}
LATTICE = ("normal", "laplace", "student", "ties")
FLT_MAX = float(np.finfo(np.float32).max)


def mx_step(a, rule):
    """The step of an MX rule as its definition says it, for a Fraction a > 0."""
    k = next(k for k in range(-300, 300) if Fraction(2) ** k <= a < Fraction(2) ** (k + 1))
    floor = Fraction(2) ** (k - 2)
    if rule == "floor":
        return floor
    if rule == "ceil":
        return next(s for s in (floor, 2 * floor) if a <= 6 * s)  # and half of `floor` would not do: 6/2 * floor < 4 * floor <= a
    if rule == "even":
        return 2 * floor if a / Fraction(2) ** k >= Fraction(7, 4) else floor
    return floor * Fraction(4, 3)


def nvfp4_bits(step, divisor):
    return np.minimum(step * np.float32(divisor), np.float32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def lattice(name, format, rows=32, groups=10):
    """(rows, cols) multiples of 2^-6 up to 64. With the divisor 1 every step, product and error of a search is a multiple of 2^-11 below 2^6, so that float32 and float64 hold it exactly."""
    rng = np.random.default_rng(LATTICE.index(name))
    shape = (rows, groups, FORMATS[format])
    spread = np.exp2(rng.integers(-5, 3, (rows, groups, 1)))
    if name == "ties":  # middles and values of the grid, and in half of the rows one magnitude in a group, so that several scales lose the same
        values = [*map(float, E2M1), *(float(a + b) / 2 for a, b in zip(E2M1[1:], E2M1[:-1], strict=True))]
        x = rng.choice([0, 0, 0, *values], shape)
        x[::2] = rng.choice(values, (rows // 2, groups, 1)) * rng.integers(0, 2, (rows // 2, *shape[1:]))
        x = x * rng.choice([-1, 1], shape) * np.exp2(rng.integers(-3, 4, (rows, groups, 1)))
    else:
        x = {"normal": rng.standard_normal, "laplace": lambda s: rng.laplace(size=s), "student": lambda s: rng.standard_t(3, s)}[name](shape) * spread * 4
    x = np.clip(np.rint(x * 64) / 64, -64, 64)
    x[0, 0] = 0
    return x.reshape(rows, -1).astype(np.float32)


def squares(groups, values):
    return np.square(groups.astype(np.float64) - values).sum(-1)


def with_small_groups(w):
    """Whole groups scaled down to where E4M3 scales are subnormal and further to where they vanish, and a group of zeros."""
    w = w.copy()
    w[1::4] *= np.exp2(-np.arange(8, 8 + len(w[1::4]), dtype=np.float32))[:, None]
    w[2, :32] = 0
    return w


def awkward():
    rng = np.random.default_rng(34)
    shape = (24, 96)
    signs = rng.choice([-1.0, 1.0], shape)
    huge = rng.uniform(0.4, 1, shape) * FLT_MAX * signs
    huge[::5, ::7] = FLT_MAX
    small = with_small_groups(rng.standard_normal(shape).astype(np.float32))
    data = {
        "normal": rng.standard_normal(shape),
        "heavy tails": rng.standard_t(2, shape),
        "ties": lattice("ties", "nvfp4", 24, 6),
        "ties under a power of two": np.concatenate([lattice("ties", "mxfp4", 24, 2), np.full((24, 32), 10.5)], axis=1),  # 2688 / 10.5 = 256
        "small groups": small,
        "wide": rng.standard_normal(shape) * np.exp2(rng.integers(-126, 126, (24, 3))).repeat(32, axis=1),
        "subnormal": rng.integers(-(2**12), 2**12, shape) * 2.0**-149,
        "a few units of the smallest number": rng.integers(-9, 10, shape) * 2.0**-149,
        "near overflow": huge,
        "one largest number": np.eye(1, 32) * FLT_MAX,
        "all largest": np.full((2, 64), FLT_MAX),
        "one smallest number": np.eye(1, 32) * 2.0**-149,
        "zero": np.zeros((3, 32)),
    }
    return {name: np.clip(x, -FLT_MAX, FLT_MAX).astype(np.float32) for name, x in data.items()}


AWKWARD = awkward()
