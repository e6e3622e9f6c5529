"""The whole method in plain NumPy, slow and readable: the executable specification that the compiled core is tested against.

Notation: W (rows, cols), H (cols, cols) = X^T X / tokens. Nothing here imports the rest of the package.
"""

import numpy as np

# ---- Elements: E2M1 codes, E4M3 and E8M0 scales (OCP Microscaling Formats v1.0, OCP 8-bit Floating Point v1.0)

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
E2M1_MIDDLES = (E2M1_VALUES[1:] + E2M1_VALUES[:-1]) / 2
GROUP_SIZE = {"mxfp4": 32, "nvfp4": 16}


def encode_e2m1(x):
    """Codes of the nearest values, ties to the even code; what rounds to zero gets code 0."""
    magnitude = np.abs(x)
    code = np.zeros(np.shape(x), dtype=np.uint8)
    for lower, middle in enumerate(E2M1_MIDDLES):  # from code `lower` to the next: at a tie the even one of the two
        code += magnitude >= middle if lower % 2 else magnitude > middle
    return np.where((np.asarray(x) < 0) & (code > 0), code + 8, code).astype(np.uint8)


def decode_e2m1(codes):
    """float32 values of codes 0 … 15."""
    return np.concatenate([E2M1_VALUES, -E2M1_VALUES])[np.asarray(codes)]


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


SEARCH_RANGE = {"mxfp4": (2, 2), "nvfp4": (8, 7)}
"""How many stored steps a search goes below and above absmax; E4M3 has eight to a power of two."""


def nvfp4_scale(sixth, g):
    """E4M3 bits of sixth * g; one that vanishes becomes 0.125, as compressed-tensors writes it."""
    bits = encode_e4m3(np.minimum(np.asarray(sixth, dtype=np.float32) * np.float32(g), np.float32(448)))
    return np.where(bits == 0, 0x20, bits).astype(np.uint8)


def search_start(amax, format, mx_rule, g):
    """The stored scale a search begins at: absmax, but the smallest E4M3 scale where NVFP4's would vanish."""
    if format == "mxfp4":
        return mx_scale(amax, mx_rule)
    bits = encode_e4m3(np.minimum(amax / np.float32(6) * np.float32(g), np.float32(448)))
    return np.where(amax == 0, 0x20, np.maximum(bits, 1)).astype(np.uint8)


def moved_scale(bits, offset, format, g):
    """The stored scale some steps away, inside what is positive and has a finite 6 * step."""
    lowest, highest = (1, 0x7E) if format == "nvfp4" else (0, 253 if np.float32(g) == 3 else 252)
    return np.clip(np.asarray(bits).astype(np.int64) + offset, lowest, highest).astype(np.uint8)


def quest_scale(groups):
    """2^floor(log2(σ 2.92247856 / 6)), σ the standard deviation about the group's mean."""
    x = groups.astype(np.float64)
    mean, square = np.zeros(x.shape[:-1]), np.zeros(x.shape[:-1])
    for c in range(x.shape[-1]):
        mean = mean + x[..., c]
    mean = mean / x.shape[-1]
    for c in range(x.shape[-1]):
        square = square + (x[..., c] - mean) * (x[..., c] - mean)
    sixth = np.sqrt(square / x.shape[-1]) * (2.92247856 / 6.0)
    _, exponent = np.frexp(sixth)
    return np.where(sixth > 0, np.clip(np.minimum(exponent - 1, 125) + 127, 0, 254), 0).astype(np.uint8)


def rounding_errors(groups, scales, format, g):
    """float64 errors x - q of groups (..., G) under their scales (...); q is the float32 value that will be read back."""
    steps = steps_of(scales, format, g)[..., None]
    return groups.astype(np.float64) - (steps * decode_e2m1(encode_e2m1(groups / steps))).astype(np.float64)


def group_losses(errors, search, h):
    """Σ err² (mse), Σ H_cc err_c² (hessian) or errᵀ H_gg err (hessian_block) of errors (rows, groups, G), summed in column order."""
    size = errors.shape[-1]
    total = np.zeros(errors.shape[:-1])
    for i in range(size):
        if search == "hessian_block":
            inner = np.zeros(errors.shape[:-1])
            for j in range(size):
                inner = inner + h[i::size, j::size].diagonal() * errors[..., j]
            total = total + errors[..., i] * inner
        else:
            weight = h.diagonal()[i::size] if search == "hessian" else 1.0
            total = total + weight * (errors[..., i] * errors[..., i])
    return total


def find_scales(w, format, search="absmax", mx_rule="even", g=None, h=None):
    """(rows, cols / G) scale bits of a float32 matrix; h (cols, cols) for the searches that weigh errors by it."""
    g = tensor_scale(w, format, mx_rule) if g is None else np.float32(g)
    groups = w.reshape(w.shape[0], -1, GROUP_SIZE[format])
    amax = np.abs(groups).max(-1)
    sixth = amax / np.float32(6)
    absmax = mx_scale(amax, mx_rule) if format == "mxfp4" else nvfp4_scale(sixth, g)
    if search == "fpquant_mse":
        for rows in (slice(i, i + 8) for i in range(0, len(w), 8)):  # few enough for a hundred steps a group to stay in the cache
            sixth[rows] = np.where(sixth[rows] > 0, searched_sixth(groups[rows], sixth[rows]), sixth[rows])
        return mx_scale(np.where(sixth > 0, np.float32(6) * sixth, amax), mx_rule) if format == "mxfp4" else nvfp4_scale(sixth, g)
    if search == "quest":
        return np.where(amax > 0, quest_scale(groups), absmax)
    if search == "four_over_six":
        to_four = nvfp4_scale(amax / np.float32(4), g)
        six, four = (group_losses(rounding_errors(groups, scales, format, g), "mse", h) for scales in (absmax, to_four))
        return np.where((four < six) & (amax > 0), to_four, absmax)
    if search in ("mse", "hessian", "hessian_block"):
        start = search_start(amax, format, mx_rule, g)
        below, above = SEARCH_RANGE[format]
        candidates = np.stack([moved_scale(start, offset, format, g) for offset in range(-below, above + 1)])
        losses = np.stack([group_losses(rounding_errors(groups, scales, format, g), search, h) for scales in candidates])
        best = np.take_along_axis(candidates, losses.argmin(0)[None], 0)[0]
        return np.where(amax > 0, best, absmax)
    return absmax


def alternating_tensor_scale(weights, search="mse", iterations=20):
    """NVFP4 divisor of matrices that share one: the least-squares factor for the present codes, then new scales, as long as Σ err² falls."""
    g = tensor_scale(np.concatenate([w.reshape(-1) for w in weights]), "nvfp4")

    def fit(g):
        values = [dequantize(*quantize(w, "nvfp4", search, g=g)[:2], "nvfp4", g).astype(np.float64) for w in weights]
        error = sum(float(((w - v) ** 2).sum()) for w, v in zip(weights, values, strict=True))
        dot, square = (sum(float(x) for x in sums) for sums in ([(w * v).sum() for w, v in zip(weights, values, strict=True)], [(v * v).sum() for v in values]))
        return error, np.float32(float(g) * square / dot) if dot > 0 else g

    error, following = fit(g)
    for _ in range(iterations):
        next_error, after = fit(following)
        if not next_error < error:
            break
        g, error, following = following, next_error, after
    return g


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


def multiply_blocks(x, matrix):
    """x T with any (k, k) block, in float32: an element adds up its k products in the order of T's rows, from zero on."""
    blocks = x.reshape(*x.shape[:-1], -1, len(matrix))
    total = np.zeros_like(blocks)
    for i, row in enumerate(matrix):
        total = total + blocks[..., i : i + 1] * row
    return total.reshape(x.shape)


def rotate_hessian(h, k):
    """T^T H T in float64, exactly symmetric."""
    h = (h + h.T) * 0.5
    if k is None:
        return h
    h = _butterflies(_butterflies(h, k).T, k).T * (1.0 / k)
    return (h + h.T) * 0.5


# ---- GPTQ


def visiting_order(h, order, group_size=1):
    """Columns in the order they are visited: left to right; by descending diagonal; or whole groups by the descending sum of their diagonals, inside a group likewise. Equal ones left to right."""
    d = h.diagonal()
    if order == "natural":
        return np.arange(len(h))
    if order == "activation":
        return np.argsort(-d, kind="stable")
    sums = np.zeros(len(h) // group_size)
    for c in range(group_size):
        sums = sums + d[c::group_size]
    return np.concatenate([g * group_size + np.argsort(-d[g * group_size : (g + 1) * group_size], kind="stable") for g in np.argsort(-sums, kind="stable")])


def damped(h, damping, dead_damping=None):
    """H + λI over the live columns, λ = damping * mean(live diagonal). A dead column (diagonal 0) is cut out and stands alone with the weight max(dead_damping, 0.01) * that mean."""
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean() if not dead.all() else 0.0
    dead_weight = max(damping if dead_damping is None else dead_damping, 0.01) * mean if mean > 0 else 1.0
    r = np.where(dead[:, None] | dead[None, :], 0.0, h)
    r[np.diag_indices(len(h))] = np.where(dead, dead_weight, h.diagonal() + damping * mean)
    return r


def with_dead_columns(h, damping):
    """H as the Hessian's scale rules weigh errors by it: a dead column counts as in damped()."""
    dead = h.diagonal() == 0
    return np.where(np.diag(dead), damped(h, damping), h)


def factorise(h, order, damping, group_size=1):
    """(visiting order, lower Cholesky factor of the damped H in reversed visiting order, damping used); the factor is None where no damping up to 1 helped.

    A factorisation counts as failed when a pivot has lost all its digits: L[i,i]² <= cols * eps * R[i,i].
    """
    visit, asked = visiting_order(h, order, group_size), damping
    while True:
        r = damped(h, damping, asked)[np.ix_(visit[::-1], visit[::-1])]
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


def gptq(w, h, steps, order="activation", damping=0.01, group_size=1):
    """GPTQ with one factorisation (Babai's nearest plane, arXiv 2507.18553).

    w (rows, cols) float32 and h (cols, cols) float64 in one basis; steps (rows, cols) float32, the step of each weight's group.
    Returns codes (rows, cols); the values t that were rounded (rows, cols) float64; damping used (None: h could not be factorised, the codes are plainly rounded).
    """
    visit, lower, used = factorise(h, order, damping, group_size)
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


def _nearest(t, steps):
    """E2M1 codes of t / step and the float64 values they are read back as."""
    codes = encode_e2m1(t / steps.astype(np.float64))
    return codes, (steps * decode_e2m1(codes)).astype(np.float64)


def row_block(rows):
    """Rows that gptq_coupled solves together: a 32nd of them, in sixteens."""
    return 16 * -(-rows // 512)


def gptq_coupled(w, h, a, solve, output_damping=0.05):
    """GPTQ against tr(A E H E^T): rows in blocks, by descending diagonal of A, each block aiming at what makes up for the blocks before it.

    The form's Cholesky factor is that of A (rows, rows) times that of H, so Babai's plane for a row is that of a row alone, moved: with U the unit factor of the damped A in reversed visiting
    order, the rows B after the rows D aim at W_B + U_BB^-T U_DB^T E_D. What couples the rows of one block is left out. ``solve(target, rows)`` returns codes and scales of such rows, and
    the float32 values they decode to. Returns codes, scales, the output damping used.
    """
    visit, lower, used = factorise(a, "activation", output_damping)
    if lower is None:
        codes, scales, _ = solve(w.astype(np.float64), np.arange(len(w)))
        return codes, scales, None
    at, unit = visit[::-1], lower / lower.diagonal()  # row at each position
    error = np.zeros(w.shape, dtype=np.float32)
    parts = {}
    for end in range(len(w), 0, -row_block(len(w))):
        own = slice(max(end - row_block(len(w)), 0), end)
        owed = np.linalg.solve(unit[own, own].T, unit[end:, own].T @ error[end:].astype(np.float64))
        codes, scales, values = solve(w[at[own]].astype(np.float64) + owed, at[own])
        parts.update(zip(at[own], zip(codes, scales, strict=True), strict=True))
        error[own] = w[at[own]] - values
    return *(np.stack([parts[row][i] for row in range(len(w))]) for i in (0, 1)), used


def gptq_searched(w, h, format, g, mx_rule="even", damping=0.01):
    """GPTQ over whole groups that chooses each group's scale when it is reached.

    A group's weights carry the feedback of the groups before it by then. Of the storable scales around absmax of what they have become, the one whose codes, found by the recursion
    inside the group, lose least: Σ L[i,i]² (t - q)². The smaller scale on a tie.
    Returns codes (rows, cols), scales (rows, cols / G), damping used; None for all where h could not be factorised.
    """
    size, (below, above) = GROUP_SIZE[format], SEARCH_RANGE[format]
    visit, lower, used = factorise(h, "group", damping, size)
    if lower is None:
        return None, None, None
    cols, unit, pivots = visit[::-1], lower / lower.diagonal(), lower.diagonal() ** 2
    weight = w[:, cols].astype(np.float64)
    error = np.zeros(w.shape)
    codes = np.empty(w.shape, dtype=np.uint8)
    scales = np.empty((len(w), w.shape[1] // size), dtype=np.uint8)
    offsets = np.arange(-below, above + 1)[:, None]
    for first in range(len(cols) - size, -1, -size):
        here = slice(first, first + size)
        fed = weight[:, here] + error[:, first + size :] @ unit[first + size :, here]
        amax = np.abs(fed).max(1).astype(np.float32)
        start = search_start(amax, format, mx_rule, g)
        bits = np.where(amax == 0, start, moved_scale(start, offsets, format, g))  # (candidates, rows)
        steps = steps_of(bits, format, g)
        e, z, lost = np.zeros((*bits.shape, size)), np.empty((*bits.shape, size), dtype=np.uint8), np.zeros(bits.shape)
        for j in range(size - 1, -1, -1):
            t = fed[:, j] + e[..., j + 1 :] @ unit[first + j + 1 : first + size, first + j]
            z[..., j], q = _nearest(t, steps)
            e[..., j] = weight[:, first + j] - q
            lost += pivots[first + j] * (t - q) ** 2
        best = lost.argmin(0), np.arange(len(w))
        scales[:, cols[first] // size], codes[:, cols[here]], error[:, here] = bits[best], z[best], e[best]
    return codes, scales, used


def refine(w, h, codes, scales, format, g, damping=0.01, rounds=1, damping_asked=None):
    """Block coordinate descent on tr((W - Ŵ)(H + λI)(W - Ŵ)^T): group after group takes the scale and codes that lose least while all others stand still.

    For the present scale and its storable neighbours: GPTQ's recursion inside the group from ŵ_g + P_g R_gg^-1, where P = (W - Ŵ) R, then one sweep of coordinate descent over its
    columns. The best of the three is taken if it lowers the loss. ``damping`` is the one that factorise() used, ``damping_asked`` the one it was given.
    Returns codes, scales and the damped loss of all rows before and after each round; it ends early where a round changes nothing.
    """
    size = GROUP_SIZE[format]
    visit = visiting_order(h, "group", size)
    cols = visit[::-1]
    r = damped(h, damping, damping_asked)[np.ix_(cols, cols)]
    codes, scales = codes.copy(), scales.copy()
    error = (w.astype(np.float64) - dequantize(codes, scales, format, g))[:, cols]
    losses = [loss(error, r)]
    rows = np.arange(len(w))
    for _ in range(rounds):
        moved = False
        for first in range(len(cols) - size, -1, -size):
            here, group = slice(first, first + size), cols[first] // size
            gram = r[here, here]
            lower = np.linalg.cholesky(gram)
            unit = lower / lower.diagonal()
            slope = error @ r[:, here]
            old = (steps_of(scales[:, group], format, g)[:, None] * decode_e2m1(codes[:, cols[here]])).astype(np.float64)
            target = old + np.linalg.solve(gram, slope.T).T
            bits = moved_scale(scales[:, group], np.array([[-1], [0], [1]]), format, g)  # (candidates, rows)
            steps = steps_of(bits, format, g)
            z, q = np.empty((*bits.shape, size), dtype=np.uint8), np.empty((*bits.shape, size))
            for j in range(size - 1, -1, -1):
                z[..., j], q[..., j] = _nearest(target[:, j] + (target[:, j + 1 :] - q[..., j + 1 :]) @ unit[j + 1 :, j], steps)
            gradient = slope + (old - q) @ gram
            for j in range(size - 1, -1, -1):
                before = q[..., j].copy()
                z[..., j], q[..., j] = _nearest(before + gradient[..., j] / gram[j, j], steps)
                gradient += (before - q[..., j])[..., None] * gram[j]
            change = old - q
            gradient = slope + change @ gram  # of the values alone, however they were found: equal values under two scales tie exactly
            rise = np.einsum("kij,kij->ki", change, slope + gradient)
            falls = rise.min(0) < 0
            best = rise.argmin(0)[falls], rows[falls]
            moved |= bool(falls.any())
            scales[falls, group], codes[np.ix_(falls, cols[here])] = bits[best], z[best]
            error[falls, here] += change[best]
        if not moved:
            break
        losses.append(loss(error, r))
    return codes, scales, losses


def shifted_target(w, h, cross, damping=0.01, strength=1.0, stream=0.0):
    """W + strength * (W (G - H) + S)(H + λI)^-1 for H = X̃^T X̃ / tokens, G = X^T X̃ / tokens and S = D^T X̃ / tokens: what answers X̃ most nearly as W answers X, and D with it, which what the
    answers are added to falls short by. float32; dead columns keep their weights."""
    gap = np.where(h.diagonal() == 0, 0.0, w.astype(np.float64) @ (cross - h) + stream)
    return (w + strength * np.linalg.solve(damped(h, damping), gap.T).T).astype(np.float32)


def loss(e, h):
    """tr(E H E^T)."""
    e = e.astype(np.float64)
    return float(np.einsum("ij,ij->", e @ h, e))


def quantize_layer(w, h, format, rotation=None, search="absmax", mx_rule="even", order="activation", damping=0.01, g=None, rounds=0, a=None):
    """Rotation, scales, GPTQ, refinement: (codes (rows, cols), scales, divisor, relative error, damping used). search "gptq" chooses scales inside GPTQ, in group order; a (rows, rows) is the
    outputs' second moment."""
    w = rotate(np.asarray(w, dtype=np.float32), rotation)
    h = rotate_hessian(np.asarray(h, dtype=np.float64), rotation)
    g = tensor_scale(w, format, mx_rule) if g is None else np.float32(g)
    _, lower, used = factorise(h, "group" if search == "gptq" else order, damping, GROUP_SIZE[format])
    used = None if lower is None else used
    static = None if search == "gptq" and used is not None else find_scales(w, format, search if search != "gptq" else "mse", mx_rule, g, with_dead_columns(h, damping))

    def solve(target, rows):
        if static is None:
            codes, scales, _ = gptq_searched(target, h, format, g, mx_rule, damping)
        else:
            scales = static[rows]
            codes, *_ = gptq(target, h, np.repeat(steps_of(scales, format, g), GROUP_SIZE[format], axis=1), order, damping, GROUP_SIZE[format])
        if rounds and used is not None:
            codes, scales, _ = refine(target, h, codes, scales, format, g, used, rounds, damping)
        return codes, scales, dequantize(codes, scales, format, g)

    if a is None or used is None:
        codes, scales, values = solve(w, np.arange(len(w)))
    else:
        codes, scales, _ = gptq_coupled(w, h, np.asarray(a, dtype=np.float64), solve)
        values = dequantize(codes, scales, format, g)
    return codes, scales, g, loss(w - values, h) / loss(w, h), used
