"""The whole method in plain NumPy, slow and readable: the executable specification that the compiled core is tested against.

Notation: W (rows, cols), H (cols, cols) = X^T X / tokens. Nothing here imports the rest of the package.
"""

import numpy as np

# ---- Elements: E2M1 codes, E4M3 and E8M0 scales (OCP Microscaling Formats v1.0, OCP 8-bit Floating Point v1.0)

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
GROUP_SIZE = {"mxfp4": 32, "nvfp4": 16}


def encode_e2m1(x):
    """Codes of the nearest values, ties to the even code; what rounds to zero gets code 0."""
    magnitude = np.abs(x)
    middles = (E2M1_VALUES[1:] + E2M1_VALUES[:-1]) / 2
    code = np.zeros(np.shape(x), dtype=np.uint8)
    for lower, middle in enumerate(middles):  # from code `lower` to the next: at a tie the even one of the two
        code += (magnitude > middle) | ((magnitude == middle) & (lower % 2 == 1))
    return np.where((np.asarray(x) < 0) & (code > 0), code + 8, code).astype(np.uint8)


def decode_e2m1(codes):
    """float32 values of codes 0 … 15."""
    codes = np.asarray(codes)
    return np.where(codes & 8, -E2M1_VALUES[codes & 7], E2M1_VALUES[codes & 7]).astype(np.float32)


def decode_e4m3(bits):
    """float32 values of E4M3 bits."""
    bits = np.asarray(bits, dtype=np.int64)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    value = np.where(bits & 0x7F == 0x7F, np.nan, value)
    return np.where(bits & 0x80, -value, value).astype(np.float32)


_E4M3_MAGNITUDES = decode_e4m3(np.arange(127)).astype(np.float64)


def encode_e4m3(x):
    """Bits of the nearest values, ties to the even bits, beyond ±448 saturated."""
    magnitude = np.minimum(np.abs(np.asarray(x, dtype=np.float64)), 448.0)
    above = np.clip(np.searchsorted(_E4M3_MAGNITUDES, magnitude), 1, 126)
    below = above - 1
    to_below, to_above = magnitude - _E4M3_MAGNITUDES[below], _E4M3_MAGNITUDES[above] - magnitude
    bits = np.where((to_below < to_above) | ((to_below == to_above) & (below % 2 == 0)), below, above)
    return (bits | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def decode_e8m0(bits):
    """float32 powers of two of E8M0 bytes."""
    bits = np.asarray(bits, dtype=np.int64)
    return np.where(bits == 255, np.nan, np.ldexp(1.0, np.minimum(bits, 254) - 127)).astype(np.float32)


# ---- Scales of groups

SHRINK_FACTORS = np.array([1.0 - i * 0.8 / 100.0 for i in range(100)]).astype(np.float32)


def power_2_4(e):
    """|e|^2.4 as e² times the square of a fifth root found by two Halley steps: operations that IEEE 754 fixes, so that C++ gets the same bits."""
    x = np.abs(e)
    high = np.maximum(x.view(np.uint64) >> np.uint64(32), np.uint64((1023 - 200) << 20))
    y = ((high * np.uint64(0x33333333) >> np.uint64(32)) + np.uint64(0x3325D000) << np.uint64(32)).view(np.float64)
    for _ in range(2):
        y5 = (y * y) * (y * y) * y
        y = y * (2.0 * y5 + 3.0 * x) / (3.0 * y5 + 2.0 * x)
    return (x * x) * (y * y)


def searched_sixth(groups, sixth):
    """fpquant_mse: of the steps SHRINK_FACTORS * amax / 6 the first with the least Σ |error|^2.4. groups (..., G) float32, sixth (...) float32."""
    steps = (SHRINK_FACTORS * sixth[..., None]).astype(np.float32)  # (..., 100)
    errors = np.zeros(steps.shape)
    for c in range(groups.shape[-1]):
        x = np.abs(groups[..., c, None].astype(np.float64))
        with np.errstate(divide="ignore", invalid="ignore"):  # a zero group has no step; its scale is set by the caller
            rounded = decode_e2m1(encode_e2m1(x / steps.astype(np.float64))).astype(np.float64)
            errors += power_2_4(np.ascontiguousarray(x - rounded * steps.astype(np.float64)))
    return np.take_along_axis(steps, errors.argmin(-1)[..., None], -1)[..., 0]


def mx_scale(a, rule):
    """E8M0 bytes for magnitudes a >= 0 by an MX rule; the exponent stops where 6 * step would overflow."""
    mantissa, exponent = np.frexp(np.asarray(a, dtype=np.float64))
    mantissa, k = mantissa * 2, exponent - 1  # a = mantissa * 2^k, 1 <= mantissa < 2
    stored = {
        "floor": k - 2,
        "ceil": k - 2 + (mantissa > 1.5),
        "even": k - 2 + (mantissa >= 1.75),
        "four-thirds": k,  # 4/3 * 2^(k-2) = 2^k / 3
    }[rule]
    highest = 126 if rule == "four-thirds" else 125
    return np.where(np.asarray(a) == 0, 0, np.clip(np.minimum(stored, highest) + 127, 0, 254)).astype(np.uint8)


def tensor_scale(x, format, mx_rule="even"):
    """The divisor of a tensor: 2688 / amax in float32 (NVFP4), 3 for four-thirds, else 1."""
    if format == "mxfp4":
        return np.float32(3 if mx_rule == "four-thirds" else 1)
    with np.errstate(divide="ignore", over="ignore"):
        g = np.float32(2688) / np.abs(x).max().astype(np.float32)
        if not np.isfinite(g):
            return np.float32(1)
        while not np.isfinite(np.float32(6) * (np.float32(448) / g)):
            g = np.nextafter(g, np.float32(np.inf))
    return g


def find_scales(w, format, search="absmax", mx_rule="even", g=None):
    """(rows, cols / G) scale bits of a float32 matrix."""
    g = tensor_scale(w, format, mx_rule) if g is None else np.float32(g)
    groups = w.reshape(w.shape[0], -1, GROUP_SIZE[format])
    amax = np.abs(groups).max(-1)
    sixth = amax / np.float32(6)
    if search == "fpquant_mse":
        sixth = np.where(sixth > 0, searched_sixth(groups, sixth), sixth)
    if format == "mxfp4":
        return mx_scale(amax if search == "absmax" else np.where(sixth > 0, np.float32(6) * sixth, amax), mx_rule)
    bits = encode_e4m3(np.minimum(sixth * g, np.float32(448)))
    return np.where(bits == 0, 0x20, bits).astype(np.uint8)


def steps_of(scales, format, g):
    """float32 steps: decoded scale / divisor."""
    return (decode_e8m0(scales) if format == "mxfp4" else decode_e4m3(scales)) / np.float32(g)


def quantize(w, format, search="absmax", mx_rule="even", g=None):
    """Codes (rows, cols) one a byte, scales, divisor."""
    w = np.asarray(w, dtype=np.float32)
    g = tensor_scale(w, format, mx_rule) if g is None else np.float32(g)
    scales = find_scales(w, format, search, mx_rule, g)
    steps = np.repeat(steps_of(scales, format, g), GROUP_SIZE[format], axis=1)
    return encode_e2m1(w / steps), scales, g


def dequantize(codes, scales, format, g):
    """float32 values of unpacked codes."""
    return np.repeat(steps_of(scales, format, g), GROUP_SIZE[format], axis=1) * decode_e2m1(codes)


def pack(codes):
    """Two codes a byte, the even column in the low nibble."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


# ---- Rotation


def sylvester(k):
    """The k x k Hadamard matrix of ±1 in Sylvester order."""
    h = np.ones((1, 1))
    while len(h) < k:
        h = np.block([[h, h], [h, -h]])
    return h


def _butterflies(x, k):
    """x times the unnormalised block-diagonal Sylvester matrix along the last axis, by butterflies of width 1, 2, 4, …, whose order of sums is the core's."""
    x = x.reshape(*x.shape[:-1], -1, k)
    half = 1
    while half < k:
        pairs = x.reshape(*x.shape[:-1], k // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
        half *= 2
    return x.reshape(*x.shape[:-2], -1)


def rotate(x, k):
    """x T with k x k Hadamard blocks, in x's dtype; k None is the identity."""
    return x if k is None else _butterflies(x, k) * x.dtype.type(1 / np.sqrt(k))


def rotate_hessian(h, k):
    """T^T H T in float64, exactly symmetric."""
    h = (h + h.T) * 0.5
    if k is None:
        return h
    h = _butterflies(_butterflies(h, k).T, k).T * (1.0 / k)
    return (h + h.T) * 0.5


# ---- GPTQ


def visiting_order(h, order):
    """Columns in the order they are visited: left to right, or by descending diagonal, equal ones left to right."""
    return np.arange(len(h)) if order == "natural" else np.argsort(-h.diagonal(), kind="stable")


def damped(h, damping):
    """H + λI over the live columns, λ = damping * mean(live diagonal); a dead column (diagonal 0) is cut out and stands alone behind a 1."""
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean() if not dead.all() else 0.0
    r = np.where(dead[:, None] | dead[None, :], 0.0, h)
    r[np.diag_indices(len(h))] = np.where(dead, 1.0, h.diagonal() + damping * mean)
    return r


def factorise(h, order, damping):
    """(visiting order, lower Cholesky factor of the damped H in reversed visiting order, damping used); the factor is None where no damping up to 1 helped.

    A factorisation counts as failed when a pivot has lost all its digits: L[i,i]² <= cols * eps * R[i,i].
    """
    visit = visiting_order(h, order)
    while True:
        r = damped(h, damping)[np.ix_(visit[::-1], visit[::-1])]
        try:
            lower = np.linalg.cholesky(r)
        except np.linalg.LinAlgError:
            lower = None
        if lower is not None and (lower.diagonal() ** 2 > len(h) * np.finfo(np.float64).eps * r.diagonal()).all():
            return visit, lower, damping
        higher = 0.01 if damping == 0 else damping * 10
        if higher > 1 + 1e-9:
            return visit, None, damping
        damping = higher


def gptq(w, h, steps, order="activation", damping=0.01):
    """GPTQ with one factorisation (Babai's nearest plane, arXiv 2507.18553).

    w (rows, cols) float32 and h (cols, cols) float64 in one basis; steps (rows, cols) float32, the step of each weight's group.
    Returns codes (rows, cols); the values t that were rounded (rows, cols) float64; damping used (None: h could not be factorised, the codes are plainly rounded).
    """
    visit, lower, used = factorise(h, order, damping)
    if lower is None:
        return encode_e2m1(w / steps), w.astype(np.float64), None
    cols = visit[::-1]  # column at each reversed position
    rounded_from = np.empty(w.shape)
    codes = np.empty(w.shape, dtype=np.uint8)
    error = np.zeros(w.shape)  # w - q by reversed position
    for i in range(len(cols) - 1, -1, -1):
        c = cols[i]
        t = w[:, c].astype(np.float64) + error[:, i + 1 :] @ (lower[i + 1 :, i] / lower[i, i])
        codes[:, c] = encode_e2m1(t / steps[:, c].astype(np.float64))
        error[:, i] = w[:, c].astype(np.float64) - (steps[:, c] * decode_e2m1(codes[:, c])).astype(np.float64)
        rounded_from[:, c] = t
    return codes, rounded_from, used


def gptq_textbook(w, h, steps, order="activation", damping=0.01):
    """GPTQ as Frantar et al. 2022 (arXiv 2210.17323) write it: the inverse of H, its upper Cholesky factor, each column's error fed to those after it. Codes (rows, cols)."""
    visit = visiting_order(h, order)
    upper = np.linalg.cholesky(np.linalg.inv(damped(h, damping)[np.ix_(visit, visit)])).T
    t = w[:, visit].astype(np.float64)
    codes = np.empty(w.shape, dtype=np.uint8)
    for i, c in enumerate(visit):
        codes[:, c] = encode_e2m1(t[:, i] / steps[:, c].astype(np.float64))
        q = (steps[:, c] * decode_e2m1(codes[:, c])).astype(np.float64)
        t[:, i:] -= np.outer((t[:, i] - q) / upper[i, i], upper[i, i:])
    return codes


def loss(e, h):
    """tr(E H E^T)."""
    e = e.astype(np.float64)
    return float(np.einsum("ij,ij->", e @ h, e))


def quantize_layer(w, h, format, rotation=None, search="absmax", mx_rule="even", order="activation", damping=0.01, g=None):
    """Rotation, scales, GPTQ: (codes (rows, cols), scales, divisor, relative error, damping used)."""
    w = rotate(np.asarray(w, dtype=np.float32), rotation)
    h = rotate_hessian(np.asarray(h, dtype=np.float64), rotation)
    g = tensor_scale(w, format, mx_rule) if g is None else np.float32(g)
    scales = find_scales(w, format, search, mx_rule, g)
    steps = np.repeat(steps_of(scales, format, g), GROUP_SIZE[format], axis=1)
    codes, _, used = gptq(w, h, steps, order, damping)
    return codes, scales, g, loss(w - dequantize(codes, scales, format, g), h) / loss(w, h), used
