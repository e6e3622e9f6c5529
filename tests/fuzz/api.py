"""Any arguments to the functions of the package: a sentence that refuses them, or an answer that fulfils what is promised.

    python tests/fuzz/api.py SECONDS [SEED]

Each property draws its arguments from a numpy Generator, so that an input is its seed. test_fuzz.py takes the first few hundred seeds of each.
"""

import os
import random
import shutil
import sys
import tempfile
import time

import ml_dtypes
import numpy as np

import mrgptq as mg
from mrgptq import reference

FORMATS = ("nvfp4", "mxfp4")
SEARCHES = {"nvfp4": [None, "absmax", "fpquant_mse", "mse", "four_over_six"], "mxfp4": [None, "absmax", "fpquant_mse", "mse", "quest", *mg.MX_RULES]}


def one_of(rng, values):
    return values[rng.integers(len(values))]


def rarely(rng, share=0.05):
    return bool(rng.random() < share)


def refused(call):
    """The answer of a call, or None where it was refused in a sentence."""
    try:
        return call()
    except (ValueError, TypeError) as error:
        message = str(error)
        assert len(message.split()) >= 4 and message.isprintable() and len(message) < 2000, f"no sentence: {message!r}"
        assert not message.startswith(("unsupported operand", "can't", "could not broadcast", "'NoneType'")), f"not ours: {message!r}"
        return None


def numbers(rng, shape):
    """float32 numbers of one of many kinds; some are not finite."""
    kind = rng.integers(8)
    if kind == 0:  # any bits
        x = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
        return np.where(np.isfinite(x), x, np.float32(1)) if rng.random() < 0.7 else x
    with np.errstate(over="ignore", under="ignore"):
        if kind == 1:  # the grid itself, ties among it
            x = one_of(rng, [0.25, 0.5, 1, 1.75, 2.5, 3.5, 5, 6, 7]) * rng.integers(-4, 5, shape)
        elif kind == 2:  # a few large ones
            x = rng.standard_normal(shape) * np.where(rng.random(shape) < 0.1, 1e4, 1)
        elif kind == 3:  # rows and columns of many sizes
            x = np.ldexp(rng.standard_normal(shape), rng.integers(-160, 120, shape))
        elif kind == 4:
            x = np.zeros(shape)
        else:
            x = rng.standard_normal(shape)
        x = np.ldexp(x, int(rng.integers(-140, 120)) if rarely(rng, 0.3) else 0).astype(np.float32)
    if rarely(rng) and x.size:
        x.reshape(-1)[rng.integers(x.size)] = one_of(rng, [np.nan, np.inf, -np.inf])
    return x


def laid_out(rng, x):
    """The same numbers in memory in one of many ways."""
    kind = rng.integers(9)
    if kind == 0:
        return np.asfortranarray(x)
    if kind == 1:
        return np.ascontiguousarray(x[..., ::-1])[..., ::-1]
    if kind == 2 and x.ndim:
        return np.ascontiguousarray(x[::-1])[::-1]
    if kind == 3:
        return np.repeat(x, 2, axis=-1)[..., ::2]
    if kind == 4:  # begins at an odd address
        memory = np.zeros(x.nbytes + 1, np.uint8)
        memory[1:] = np.frombuffer(x.tobytes(), np.uint8)
        return memory[1:].view(x.dtype).reshape(x.shape)
    if kind == 5 and x.size:
        x = x.copy()
        x.flags.writeable = False
    return x


def argument(rng, shape):
    """(what is handed over, its float32 values or None where the dtype is refused, the argument dtype)."""
    x = numbers(rng, shape)
    kind = one_of(rng, ["f4"] * 5 + ["f8", "f2", "bfloat16", "bits", ">f4", "list", "wrong"])
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if kind == "wrong":
            return np.nan_to_num(x).astype(one_of(rng, ["i4", "u1", "c8", "?", "O"])), None, None
        if kind == "list":
            return x.tolist(), x, None
        if kind == "bits":
            bits = x.astype(ml_dtypes.bfloat16)
            return laid_out(rng, bits.view(np.uint16)), bits.astype(np.float32), "bfloat16"
        given = x.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
        return laid_out(rng, given), given.astype(np.float32), None


def shape_of(rng, group, rows=5, groups=4):
    cols = group * int(rng.integers(1, groups + 1))
    return int(rng.integers(1, rows + 1)), cols + (int(rng.integers(1, group)) if rarely(rng) else 0)


def rotation_of(rng, cols):
    """A rotation that mostly fits."""
    size = one_of(rng, [None, None, None, 2, 16, 32, 64, 128])
    return None if size is None else mg.Hadamard(size)


def threads_of(rng):
    return one_of(rng, [1, 1, 2, 3])


def divisor_of(rng, format):
    if rng.random() < 0.7:
        return None
    return one_of(rng, [1.0, 3.0, 2688.0, 0.0, -1.0, np.nan, np.inf, 1e-40, 1e30, 1e300, True, "1", np.float32(7), 1 + 1e-12, 100.0])


def bytes_of(q):
    return q.codes.tobytes(), q.scales.tobytes(), q.tensor_scale


def quantize(rng):
    """mg.quantize: the reference's bytes; refused where a value is not finite, and only for a reason."""
    format = one_of(rng, FORMATS)
    shape = shape_of(rng, reference.GROUP_SIZE[format])
    given, x, dtype = argument(rng, shape)
    search, rule, divisor, rotation = one_of(rng, SEARCHES[format]), one_of(rng, mg.MX_RULES), divisor_of(rng, format), rotation_of(rng, shape[1])
    options = {"scales": search, "mx_rule": rule, "tensor_scale": divisor, "rotation": rotation, "dtype": dtype}
    if rarely(rng):
        options[one_of(rng, ["scales", "mx_rule", "rotation", "dtype"])] = one_of(rng, ["nothing", 7, b"", 1.5])
    before = given.tobytes() if isinstance(given, np.ndarray) else None
    q = refused(lambda: mg.quantize(given, format, **options, threads=1))
    assert before is None or given.tobytes() == before, "the argument was changed"
    if q is None:
        return
    assert x is not None and np.isfinite(x).all(), "what is not finite was taken"
    assert bytes_of(q) == bytes_of(mg.quantize(given, format, **options, threads=3)), "threads reach the bytes"
    k = None if rotation is None else rotation.block_size
    name, by = ("absmax", search) if search in mg.MX_RULES else (search or "absmax", rule)
    with np.errstate(all="ignore"):
        codes, scales, g = reference.quantize(reference.rotate(x, k), format, name, by, divisor)
        values = reference.dequantize(codes, scales, format, g)
    assert q.tensor_scale == g, "another divisor"
    assert np.array_equal(q.scales, scales), "other scales"
    assert np.array_equal(q.codes, reference.pack(codes)), "other codes"
    assert np.array_equal(q.dequantize().view(np.uint32), values.view(np.uint32)), "other values"
    assert np.array_equal(mg.pack(mg.unpack(q.codes)), q.codes) and np.array_equal(mg.from_blocked(mg.to_blocked(q.scales), q.scales.shape), q.scales), "packing does not come back"
    assert bytes_of(mg.prepack(q).unpack()) == bytes_of(q), "tiles do not come back"
    # By four-thirds a group's largest value may be rounded up to where the next scale begins.
    normal = format == "mxfp4" or (scales >= 8).all()  # a scale that is not may vanish the second time
    if normal and name == "absmax" and (format, by) != ("mxfp4", "four-thirds") and divisor is None and moderate(x) and moderate(values):
        again = mg.quantize(values, format, mx_rule=by, tensor_scale=q.tensor_scale)
        assert np.array_equal(again.dequantize(), values), "rounding twice is not rounding once"


def moderate(x):
    """Neither so small that scales vanish nor so large that they saturate."""
    largest = np.abs(x).max(initial=0)
    return 1e-20 < largest < 1e20


def round_activations(rng):
    """mg.round_activations and mg.quantize_activations give the same values, for any leading axes, in place as well."""
    format = one_of(rng, FORMATS)
    shape = (*[int(n) for n in rng.integers(1, 4, rng.integers(0, 3))], reference.GROUP_SIZE[format] * int(rng.integers(1, 4)))
    given, x, dtype = argument(rng, shape)
    options = {"rule": one_of(rng, [s for s in SEARCHES[format] if s]), "mx_rule": one_of(rng, mg.MX_RULES), "tensor_scale": divisor_of(rng, format), "rotation": rotation_of(rng, shape[-1]), "dtype": dtype}
    values = refused(lambda: mg.round_activations(given, format, **options, threads=1))
    packed = refused(lambda: mg.quantize_activations(given, format, **options, threads=3))
    assert (values is None) == (packed is None), "one of the two was refused"
    if values is None:
        return
    assert values.shape == shape and np.array_equal(values.reshape(-1, shape[-1]).view(np.uint32), packed.dequantize().view(np.uint32)), "other values than the packed ones"
    if options["rotation"] is None and isinstance(given, np.ndarray) and given.dtype == np.float32 and given.flags.writeable and given.flags.c_contiguous and given.flags.aligned:
        assert np.array_equal(mg.round_activations(given, format, **options, out=given).view(np.uint32), values.view(np.uint32)), "in place it is another"


def some_matrix(rng, rows=None, cols=None):
    """A QuantizedMatrix of numbers that are neither tiny nor huge."""
    format = one_of(rng, FORMATS)
    rows, cols = rows or int(rng.integers(1, 40)), cols or 32 * int(rng.integers(1, 5))
    rotation = mg.Hadamard(one_of(rng, [16, 32])) if rng.random() < 0.3 else None
    return mg.quantize(rng.standard_normal((rows, cols)) * 2.0 ** rng.integers(-8, 8), format, rotation=rotation, scales=one_of(rng, SEARCHES[format]), mx_rule=one_of(rng, mg.MX_RULES[:3]))


def matmul(rng):
    """mg.matmul: near the product in float64, the same from tiles, for any number of threads and for a token alone."""
    q = some_matrix(rng)
    lead = tuple(int(n) for n in rng.integers(1, 4, rng.integers(0, 3)))
    shape = (*lead, q.shape[1] + (1 if rarely(rng) else 0))
    given, x, dtype = argument(rng, shape)
    activations = one_of(rng, [None, None, "int8", "nvfp4", "mxfp4", "fp8", 3])
    out = refused(lambda: mg.matmul(given, q, activations=activations, dtype=dtype, threads=1))
    if out is None:
        return
    assert x is not None and np.isfinite(x).all() and out.shape == (*lead, q.shape[0])
    tiles = mg.matmul(given, mg.prepack(q), activations=activations, dtype=dtype, threads=3)
    assert np.array_equal(tiles.view(np.uint32), out.view(np.uint32)) or (np.isnan(out) == np.isnan(tiles)).all() and np.array_equal(tiles[~np.isnan(out)], out[~np.isnan(out)]), "tiles or threads give another product"
    flat = x.reshape(-1, shape[-1])
    if activations != "nvfp4" and len(flat) > 1:  # whose tensor scale depends on all tokens
        row = int(rng.integers(len(flat)))
        alone = mg.matmul(flat[row : row + 1], q, activations=activations)
        # bfloat16 inputs round their sixths otherwise than float32 ones do.
        assert dtype or getattr(given, "dtype", None) == ml_dtypes.bfloat16 or np.array_equal(alone[0], out.reshape(-1, q.shape[0])[row], equal_nan=True), "a token alone has another product"
    with np.errstate(all="ignore"):
        turned = q.rotation.dual.apply(flat)
        if activations is None and ((np.abs(turned) > 1e-20) | (turned == 0)).all() and np.abs(turned).max() < 1e20:
            wide, w = turned.astype(np.float64), q.dequantize().astype(np.float64)
            n = 40 + -(-q.shape[1] // 128)
            assert (np.abs(out.reshape(-1, q.shape[0]) - wide @ w.T) <= 1.01 * n * 2.0**-24 * (np.abs(wide) @ np.abs(w).T) + 2.0**-145).all(), "a product is far from its sum"


def hessian(rng):
    """mg.Hessian: X^T X / tokens, whatever the batches, and the same for any number of threads."""
    cols = int(rng.integers(1, 40))
    sums, total, tokens = [mg.Hessian(cols), mg.Hessian(cols)], np.zeros((cols, cols)), 0
    for _ in range(rng.integers(1, 4)):
        shape = (*[int(n) for n in rng.integers(0 if rarely(rng) else 1, 6, rng.integers(1, 3))], cols + (1 if rarely(rng) else 0))
        given, x, dtype = argument(rng, shape)
        before = sums[0].tokens
        for threads, moment in zip((1, 3), sums, strict=True):
            refused(lambda moment=moment, threads=threads, given=given, dtype=dtype: moment.update(given, dtype=dtype, threads=threads))
        if sums[0].tokens != before:
            assert x is not None and np.isfinite(x).all()
            wide = x.reshape(-1, cols).astype(np.float64)
            total, tokens = total + wide.T @ wide, tokens + len(wide)
    assert sums[0].tokens == sums[1].tokens == tokens
    matrix = sums[0].matrix
    assert np.array_equal(matrix, sums[1].matrix) and np.array_equal(matrix, matrix.T), "threads reach the sum, or it is not symmetric"
    if tokens and np.isfinite(total).all():
        size = np.sqrt(np.outer(total.diagonal(), total.diagonal())) / tokens  # at least |X|^T |X| / tokens
        if total.max(initial=0) < 1e37:  # a panel's product is float32: a chain of at most 256 roundings, and what falls below its range
            assert (np.abs(matrix - total / tokens) <= 257 * 2.0**-24 * size + 2.0**-140).all(), "not the second moment"
    merged = mg.Hessian(cols)
    merged.merge(sums[0])
    assert merged.tokens == tokens and np.array_equal(merged.matrix, matrix)


def quantize_layer(rng):
    """mg.quantize_layer: finite values in the layout asked for, the same bytes for any number of threads, plain rounding where nothing else is asked."""
    format = one_of(rng, FORMATS)
    shape = shape_of(rng, reference.GROUP_SIZE[format], groups=3)
    given, x, dtype = argument(rng, shape)
    cols = shape[1]
    tokens = int(rng.integers(1, 3 * cols))
    inputs = np.nan_to_num(numbers(rng, (tokens, cols)), posinf=1, neginf=1).astype(np.float64)
    inputs[:, rng.random(cols) < one_of(rng, [0, 0, 0.2, 1])] = 0  # dead columns
    with np.errstate(all="ignore"):
        h = inputs.T @ inputs / tokens
        h = (h + h.T) / 2
    kind = one_of(rng, ["as it is"] * 5 + ["none", "not symmetric", "negative", "nan", "small", "float32"])
    if kind == "none":
        h = None
    elif kind == "not symmetric":
        h[0, -1] += 1
    elif kind == "negative":
        h[-1, -1] = -1
    elif kind == "nan":
        h[0, 0] = np.nan
    elif kind == "small":
        h = h[1:, 1:]
    elif kind == "float32":
        with np.errstate(over="ignore"):
            h = h.astype(np.float32)
    name = one_of(rng, ["rtn", "gptq", "mr-gptq", "best", "best-online"])
    fields = {"rotation": [None, None, 16, 32], "scales": [None, "absmax", "mse", "hessian", "hessian_block", "gptq", "fpquant_mse", "nothing"], "order": ["natural", "activation", "group", 3], "damping": [0.01, 0, 1, -1, np.nan, 1e-9],
              "rounds": [0, 1, 3, -1, 1.5], "mx_rule": mg.MX_RULES, "precision": ["float32", "float64", "float16"], "tensor_scale": ["absmax", "alternating", 1]}  # fmt: skip
    changes = {field: one_of(rng, values) for field, values in fields.items() if rarely(rng, 0.25)}
    recipe = refused(lambda: mg.Recipe.from_dict(mg.Recipe.named(name, format).as_dict() | changes))
    if recipe is None:
        return
    options = {"dtype": dtype, "tensor_scale": divisor_of(rng, format) if rarely(rng, 0.2) else None}
    if rarely(rng, 0.2):
        gradients = rng.standard_normal((8, shape[0]))
        options["output_hessian"] = gradients.T @ gradients
    q = refused(lambda: mg.quantize_layer(given, h, recipe, **options, threads=1))
    if q is None:
        return
    assert x is not None and np.isfinite(x).all() and (h is None or np.isfinite(h).all())
    assert q.shape == shape and q.format == format and q.report is not None
    values = q.dequantize()
    assert np.isfinite(values).all(), "a value is not finite"
    assert bytes_of(q) == bytes_of(mg.quantize_layer(given, h, recipe, **options, threads=3)), "threads reach the bytes"
    if recipe.solver == "rtn" and recipe.tensor_scale == "absmax" and recipe.resolved_scales[0] == "absmax":
        plain = mg.quantize(given, format, mx_rule=recipe.resolved_scales[1], tensor_scale=options["tensor_scale"], rotation=None if recipe.rotation is None else recipe.fit(shape[1])[1], dtype=dtype)
        assert bytes_of(plain) == bytes_of(q), "rounding is not mg.quantize"


def save_and_load(rng):
    """mg.save and mg.load: what was saved comes back, bit for bit and by name, or nothing is there."""
    tensors = {}
    for i in range(rng.integers(1, 4)):
        shape = tuple(int(n) for n in rng.integers(0, 4, rng.integers(0, 3)))
        tensors[one_of(rng, [f"t{i}", f"norm.{i}.weight", "../up", "/etc/x", "\x1b", "ü" * i, ""])] = np.asarray(rng.integers(0, 200, shape)).astype(one_of(rng, ["u1", "f4", "f8", "i8", "?", "c8", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, "O"]))
    cols = 32 * int(rng.integers(1, 4))
    format, dialect = one_of(rng, FORMATS), one_of(rng, ["compressed-tensors", "fp_quant", "mrgptq"])
    activations = one_of(rng, [None, format])
    recipe = refused(lambda: mg.Recipe.named("rtn", format, dialect, activations))
    if recipe is None:
        return
    matrix = mg.quantize_layer(rng.standard_normal((int(rng.integers(1, 5)), cols)), None, recipe)
    if activations == "nvfp4":
        matrix = mg.QuantizedMatrix(matrix.format, matrix.codes, matrix.scales, matrix.tensor_scale, matrix.rotation, mg.Activations("nvfp4", tensor_scale=2.5, mx_rule=matrix.activations.mx_rule), matrix.recipe, matrix.report)
    tensors["layers.0.up.weight"] = matrix
    folder = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    try:
        out = os.path.join(folder, "out")
        limit = int(one_of(rng, [1, 100, 10**9, 0]))
        if refused(lambda: mg.save(out, tensors, dialect, config={"a": 1}, max_shard_bytes=limit) or True) is None:
            assert os.listdir(folder) == [], "a refused save left something"
            return
        assert os.listdir(folder) == ["out"], "something else was written"
        back = mg.load(out)
        assert set(back) == set(tensors), "other names"
        for name, value in tensors.items():
            if name == "layers.0.up.weight":
                assert bytes_of(back[name]) == bytes_of(matrix) and back[name].rotation == matrix.rotation and back[name].activations == matrix.activations, "another matrix"
            else:
                stored = back[name].bits if isinstance(back[name], mg.StoredTensor) else back[name]
                assert stored.tobytes() == value.tobytes() and stored.shape == value.shape, "another tensor"
    finally:
        shutil.rmtree(folder)


PROPERTIES = (quantize, round_activations, matmul, hessian, quantize_layer, save_and_load)


def check(prop, seed):
    """One input. Whatever breaks the promise is an AssertionError that names property and seed; so is any exception that is no refusal."""
    try:
        prop(np.random.default_rng(seed))
    except Exception as error:
        raise AssertionError(f"api, {prop.__name__}, seed {seed}: {type(error).__name__}: {error}") from error


def run(seed, seconds):
    """Inputs of every property in turn until the time is up: their number."""
    draw, end, done = random.Random(seed), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for prop in PROPERTIES:
            check(prop, draw.randrange(2**63))
            done += 1
    return done


if __name__ == "__main__":
    print(f"api: {run(int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32), float(sys.argv[1]))} inputs, 0 broken")
