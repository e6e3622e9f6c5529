"""quantize_layer end to end: GPTQ pays on every layer of leaf, equal questions get equal bytes, and the report says whatever was done instead of what was asked."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import ml_dtypes
import numpy as np
import pytest

import mrgptq as mg
from mrgptq import reference

FORMATS = ["nvfp4", "mxfp4"]


def same(a, b):
    return a.codes.tobytes() == b.codes.tobytes() and a.scales.tobytes() == b.scales.tobytes() and a.tensor_scale == b.tensor_scale and a.rotation == b.rotation


def facts(report):
    """The report without what a clock decides."""
    return {name: value for name, value in report.as_dict().items() if name != "seconds"}


def layer(seed=0, rows=20, cols=128, tokens=400):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, cols)) @ (np.eye(cols) + rng.standard_normal((cols, cols)) / np.sqrt(cols))
    return rng.standard_normal((rows, cols)).astype(np.float32), x.astype(np.float32)


def second_moment(x):
    return x.astype(np.float64).T @ x / len(x)


# ---- What it is for


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_gptq_beats_rounding_on_every_layer_of_leaf(leaf, format, precision):
    """Relative errors computed here from the dequantised weights, in the original basis: the rotation and the report have to be right for this to hold."""
    for name, w in leaf.weights.items():
        h = leaf.hessians[name]
        energy = reference.loss(w, h)
        errors = {}
        for recipe in ("rtn", "gptq", "mr-gptq"):
            q = mg.quantize_layer(w, h, replace(mg.Recipe.named(recipe, format), precision=precision))
            e = w.astype(np.float64) - q.dequantize(unrotate=True)
            errors[recipe] = reference.loss(e, h) / energy
            # W was rotated, Ŵ turned back, E subtracted, all in float32: log2(k) + 1 roundings each, norm-wise, of a matrix no longer than 1.1 |W|. In the norm of H, whose
            # largest eigenvalue it may meet, that moves sqrt(tr E H E^T) and sqrt(tr W H W^T) by at most `apart`, and so the root of their ratio, below 1, by twice that.
            apart = 1.1 * 3 * (np.log2(q.rotation.block_size or 1) + 1) * 2.0**-24 * np.linalg.norm(w) * np.sqrt(np.linalg.norm(h, 2))
            assert abs(np.sqrt(q.report.relative_error) - np.sqrt(errors[recipe])) <= 2 * apart / np.sqrt(energy), (name, recipe)
        assert errors["gptq"] < errors["rtn"] and errors["mr-gptq"] < errors["rtn"], (name, errors)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["layers.0.self_attn.k_proj", "layers.2.mlp.down_proj"])
def test_mr_gptq_is_the_reference_s_whole_pipeline(leaf, format, name):
    recipe = replace(mg.Recipe.named("mr-gptq", format), precision="float64")
    q = mg.quantize_layer(leaf.weights[name], leaf.hessians[name], recipe)
    codes, scales, g, error, used = reference.quantize_layer(leaf.weights[name], leaf.hessians[name], format, recipe.rotation, recipe.scales)
    assert np.array_equal(mg.unpack(q.codes), codes) and np.array_equal(q.scales, scales)
    assert q.tensor_scale == g and q.report.damping == used
    assert abs(q.report.relative_error / error - 1) < 1e-11  # the same codes and the same float32 E; sums of 384² float64 terms


# ---- Equal questions, equal bytes


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "mr-gptq"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_way_to_say_it_gives_the_same_bytes(recipe, format):
    w, x = layer()
    h = mg.Hessian(128)
    h.update(x)
    expected = mg.quantize_layer(w, h, recipe, format=format)
    ways = [
        mg.quantize_layer(w, h.matrix, mg.Recipe.named(recipe, format)),
        mg.quantize_layer(w, h.matrix.tolist(), recipe, format=format),
        mg.quantize_layer(w, np.asfortranarray(h.matrix), recipe, format=format),
        mg.quantize_layer(w.astype(np.float64), h, recipe, format=format),
        mg.quantize_layer(np.asfortranarray(w), h, recipe, format=format),
        mg.quantize_layer(np.repeat(w, 3, axis=0)[::3], h, recipe, format=format),
        mg.quantize_layer(w, h, recipe, format=format, tensor_scale=expected.tensor_scale),
        *[mg.quantize_layer(w, h, recipe, format=format, factor=mg.make_factor(h, recipe, format=format)) for _ in range(recipe != "rtn")],
        *[mg.quantize_layer(w, h, recipe, format=format, threads=threads) for threads in (1, 2, 3, 8)],
    ]
    for i, other in enumerate(ways):
        assert same(other, expected), i
        assert facts(other.report) | {"tokens": None} == facts(expected.report) | {"tokens": None}, i
    assert expected.report.tokens == 400 and ways[0].report.tokens is None
    assert expected.recipe == mg.Recipe.named(recipe, format)


def test_bfloat16_comes_in_four_ways_and_float16_in_one():
    w, x = layer(1)
    h = second_moment(x)
    narrow = w.astype(ml_dtypes.bfloat16)
    expected = mg.quantize_layer(narrow.astype(np.float32), h)
    bits = narrow.view(np.uint16)
    assert same(mg.quantize_layer(narrow, h), expected)
    assert same(mg.quantize_layer(bits, h, dtype="bfloat16"), expected)
    assert same(mg.quantize_layer(mg.StoredTensor.of(narrow), h), expected)
    assert same(mg.quantize_layer(mg.StoredTensor.from_bits("BF16", bits), h), expected)
    assert not same(mg.quantize_layer(w, h), expected)
    assert same(mg.quantize_layer(w.astype(np.float16), h), mg.quantize_layer(w.astype(np.float16).astype(np.float32), h))


def test_two_python_threads_at_once_give_what_one_gives():
    jobs = [(*layer(seed, rows=100), recipe, format) for seed in range(3) for recipe in ("gptq", "mr-gptq") for format in FORMATS]

    def work(job):
        w, x, recipe, format = job
        h = mg.Hessian(128)
        for part in np.array_split(x, 5):
            h.update(part)
        return mg.quantize_layer(w, h, recipe, format=format, threads=2)

    serial = [work(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for a, b in zip(pool.map(work, jobs), serial, strict=True):
            assert same(a, b) and facts(a.report) == facts(b.report)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129])
def test_a_row_does_not_know_the_others(rows):
    """Rows are solved in tiles of 64, padded: any subset gives the same codes, given the same tensor scale."""
    w, x = layer(4, rows=150)
    h = second_moment(x)
    whole = mg.quantize_layer(w, h)
    part = mg.quantize_layer(w[:rows], h, tensor_scale=whole.tensor_scale)
    assert np.array_equal(part.codes, whole.codes[:rows]) and np.array_equal(part.scales, whole.scales[:rows])


def test_a_shared_tensor_scale_is_used_and_kept():
    w, x = layer(5)
    h = second_moment(x)
    g = mg.quantize_layer(w, h).tensor_scale
    q = mg.quantize_layer(w, h, tensor_scale=g / 2)
    assert q.tensor_scale == g / 2 and not np.array_equal(q.scales, mg.quantize_layer(w, h).scales)
    recipe = mg.Recipe("mxfp4", mx_rule="four-thirds")
    assert mg.quantize_layer(w, h, recipe).tensor_scale == 3
    assert same(mg.quantize_layer(w, h, recipe, tensor_scale=3), mg.quantize_layer(w, h, recipe))


def test_one_factor_serves_layers_with_one_input(leaf):
    names = [f"layers.2.self_attn.{p}_proj" for p in "qkv"]
    for recipe in ("gptq", "mr-gptq"):
        factor = mg.make_factor(leaf.hessians[names[0]], recipe)
        assert sorted(factor.order) == list(range(128)) and factor.usable and factor.damping == factor.damping_asked == 0.01
        for name in names:
            shared, own = mg.quantize_layer(leaf.weights[name], None, recipe, factor=factor), mg.quantize_layer(leaf.weights[name], leaf.hessians[name], recipe)
            assert same(shared, own) and facts(shared.report) == facts(own.report)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rotation": 32}, r"rotation Hadamard\(16\); the layer and its recipe need Hadamard\(32\)"),
        ({"rotation": None}, r"rotation Hadamard\(16\); the layer and its recipe need Identity\(\)"),
        ({"order": "natural"}, "order activation; the layer and its recipe need natural"),
        ({"damping": 0.1}, "damping 0.01; the layer and its recipe need 0.1"),
    ],
)
def test_a_factor_made_for_another_recipe_is_refused_by_name(change, words):
    w, x = layer()
    recipe = mg.Recipe.named("mr-gptq")
    factor = mg.make_factor(second_moment(x), recipe)
    with pytest.raises(ValueError, match=f"factor was made with {words}"):
        mg.quantize_layer(w, None, replace(recipe, **change), factor=factor)
    with pytest.raises(ValueError, match="factor was made with columns 128; the layer and its recipe need 64"):
        mg.quantize_layer(w[:, :64], None, recipe, factor=factor)
    assert mg.quantize_layer(w, None, replace(recipe, precision="float64", scales="absmax"), factor=factor).report.method == "gptq"  # what the factor does not depend on
    with pytest.raises(ValueError, match='factor is given, but the solver "rtn" uses none'):
        mg.quantize_layer(w, None, replace(recipe, solver="rtn"), factor=factor)


# ---- The result and its report


@pytest.mark.parametrize("format", FORMATS)
def test_the_values_come_back_in_either_basis(format):
    w, x = layer(6)
    q = mg.quantize_layer(w, second_moment(x), "mr-gptq", format=format)
    rotated = mg.Hadamard(q.rotation.block_size).apply(w)
    assert q.rotation == mg.Hadamard({"nvfp4": 16, "mxfp4": 32}[format]) and q.shape == w.shape
    weight_error = ((rotated - q.dequantize()).astype(np.float64) ** 2).sum() / (rotated.astype(np.float64) ** 2).sum()
    assert abs(q.report.weight_error / weight_error - 1) < 1e-6  # float32 differences, float64 sums
    assert 0 < weight_error < 0.05  # a 4-bit float keeps a normal value to some 10 %, an energy of 1 %; feedback costs a little weight error
    back = q.dequantize(unrotate=True)
    assert abs(((w - back).astype(np.float64) ** 2).sum() / (w.astype(np.float64) ** 2).sum() / weight_error - 1) < 1e-4  # orthogonal: the same error in either basis
    assert not np.allclose(q.dequantize(), back)


def test_rounding_needs_no_hessian_and_says_what_it_does_not_know():
    w, x = layer(7)
    without, known = mg.quantize_layer(w, None, "rtn"), mg.quantize_layer(w, second_moment(x), "rtn")
    assert same(without, known) and same(without, mg.quantize(w))
    unknown = {name for name, value in facts(without.report).items() if value is None}
    assert unknown == {"relative_error", "damping", "damping_asked", "dead_columns", "fallback", "tokens"}
    e = w.astype(np.float64) - known.dequantize()
    h = second_moment(x)
    assert abs(known.report.relative_error / (reference.loss(e, h) / reference.loss(w, h)) - 1) < 1e-5  # E rounded to float32
    assert known.report.dead_columns == 0 and known.report.damping is None
    assert (known.report.method, known.report.fallback) == ("rounding", None)


def test_the_report_is_complete():
    w, x = layer(8)
    report = mg.quantize_layer(w, second_moment(x), mg.Recipe("mxfp4", scales="fpquant_mse")).report
    assert [f.name for f in fields(report)] == [
        "method", "format", "rows", "cols", "scales", "weight_error", "relative_error", "damping", "damping_asked", "dead_columns", "fallback", "tokens", "seconds",
    ]  # fmt: skip
    assert (report.method, report.format, report.rows, report.cols, report.scales) == ("gptq", "mxfp4", 20, 128, "fpquant_mse, even")
    assert (report.damping, report.damping_asked, report.dead_columns, report.fallback, report.tokens) == (0.01, 0.01, 0, None, None)
    assert 0 < report.relative_error < report.weight_error < 1 and 0 < report.seconds < 60
