"""quantize_layer end to end: GPTQ pays on every layer of leaf, equal questions get equal bytes, and the report says whatever was done instead of what was asked."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import ml_dtypes
import numpy as np
import pytest
import scipy.linalg

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
        for recipe in ("rtn", "gptq", "mr-gptq", "best"):
            q = mg.quantize_layer(w, h, replace(mg.Recipe.named(recipe, format), precision=precision))
            e = w.astype(np.float64) - q.dequantize(unrotate=True)
            errors[recipe] = reference.loss(e, h) / energy
            # W was rotated, Ŵ turned back, E subtracted, all in float32: log2(k) + 1 roundings each, norm-wise, of a matrix no longer than 1.1 |W|. In the norm of H, whose
            # largest eigenvalue it may meet, that moves sqrt(tr E H E^T) and sqrt(tr W H W^T) by at most `apart`, and so the root of their ratio, below 1, by twice that.
            apart = 1.1 * 3 * (np.log2(q.rotation.block_size or 1) + 1) * 2.0**-24 * np.linalg.norm(w) * np.sqrt(np.linalg.norm(h, 2))
            assert abs(np.sqrt(q.report.relative_error) - np.sqrt(errors[recipe])) <= 2 * apart / np.sqrt(energy), (name, recipe)
            # And what plain rounding would have had, to set beside: absmax scales in the recipe's own basis.
            plain = mg.quantize_layer(w, h, mg.Recipe(format, rotation=q.recipe.rotation, solver="rtn", scales="absmax"))
            assert plain.report.relative_error == plain.report.rounded_error
            # Both forms of the quotient, with float32 products, are off by at most this much of themselves: sums of cols terms that may cancel.
            rotated, turned = q.rotation.apply(w), q.rotation.apply_hessian(h)
            forms = [reference.loss(abs(x), abs(turned)) / reference.loss(x, turned) for x in (rotated, rotated - plain.dequantize())]
            off = 2 * (len(h) + 4) * (2.0**-24 if precision == "float32" else 2.0**-53) * sum(forms) if recipe != "rtn" else 0
            assert abs(q.report.rounded_error / plain.report.relative_error - 1) <= off
        assert errors["best"] < errors["gptq"] < errors["rtn"] and errors["mr-gptq"] < errors["rtn"], (name, errors)


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


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "mr-gptq", "best"])
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
    jobs = [(*layer(seed, rows=100), recipe, format) for seed in range(3) for recipe in ("gptq", "mr-gptq", "best") for format in FORMATS]

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


@pytest.mark.parametrize("recipe", ["mr-gptq", "best"])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129])
def test_a_row_does_not_know_the_others(rows, recipe):
    """Rows are solved in tiles of 32, padded: any subset gives the same codes, given the same tensor scale."""
    w, x = layer(4, rows=150)
    h = second_moment(x)
    whole = mg.quantize_layer(w, h, recipe)
    part = mg.quantize_layer(w[:rows], h, recipe, tensor_scale=whole.tensor_scale)
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
    for recipe in ("gptq", "mr-gptq", "best"):
        factor = mg.make_factor(leaf.hessians[names[0]], recipe)
        assert sorted(factor.order) == list(range(128)) and factor.usable and factor.damping == factor.damping_asked == mg.Recipe.named(recipe).damping
        for name in names:
            shared, own = mg.quantize_layer(leaf.weights[name], None, recipe, factor=factor), mg.quantize_layer(leaf.weights[name], leaf.hessians[name], recipe)
            assert same(shared, own) and facts(shared.report) == facts(own.report)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rotation": 32}, r"rotation Hadamard\(16\); the layer and its recipe need Hadamard\(32\)"),
        ({"rotation": None}, r"rotation Hadamard\(16\); the layer and its recipe need Identity\(\)"),
        ({"order": "natural"}, "order activation; the layer and its recipe need natural"),
        ({"order": "group"}, "order activation; the layer and its recipe need group"),
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
    with pytest.raises(ValueError, match=r"hessian has shape \(64, 64\); a weight of 128 columns"):
        mg.quantize_layer(w, np.eye(64), recipe, factor=factor)
    assert mg.quantize_layer(w, None, replace(recipe, precision="float32", scales="absmax"), factor=factor).report.method == "gptq"  # what the factor does not depend on, or is good enough for
    single = mg.make_factor(second_moment(x), replace(recipe, precision="float32"))
    with pytest.raises(ValueError, match="factor was made with precision float32; the recipe needs float64"):
        mg.quantize_layer(w, None, recipe, factor=single)
    with pytest.raises(ValueError, match='factor is given, but the solver "rtn" uses none'):
        mg.quantize_layer(w, None, replace(recipe, solver="rtn"), factor=factor)
    in_groups = mg.make_factor(second_moment(x), mg.Recipe(order="group"))
    with pytest.raises(ValueError, match="factor was made with group_size 16; the layer and its recipe need 32"):
        mg.quantize_layer(w, None, mg.Recipe("mxfp4", order="group"), factor=in_groups)
    assert mg.quantize_layer(w, None, mg.Recipe(order="group", scales="gptq", rounds=1), factor=in_groups).report.rounds == 1


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
    assert unknown == {"relative_error", "damping", "damping_asked", "dead_columns", "fallback", "precision", "rounded_error", "output_error", "rounded_output_error", "output_damping", "tokens", "rotation"}
    e = w.astype(np.float64) - known.dequantize()
    h = second_moment(x)
    assert abs(known.report.relative_error / (reference.loss(e, h) / reference.loss(w, h)) - 1) < 1e-5  # E rounded to float32
    assert known.report.rounded_error == known.report.relative_error  # nothing else was done
    assert known.report.dead_columns == 0 and known.report.damping is None
    assert (known.report.method, known.report.fallback) == ("rounding", None)
    for report in (without.report, known.report):
        assert (report.damped_errors, report.rounds, report.cross, report.scale_offsets) == ((), 0, 0.0, {0: 20 * 8})


def test_the_report_is_complete():
    w, x = layer(8)
    report = mg.quantize_layer(w, second_moment(x), mg.Recipe("mxfp4", scales="fpquant_mse")).report
    assert [f.name for f in fields(report)] == [
        "method", "format", "rows", "cols", "scales", "weight_error", "relative_error", "damping", "damping_asked", "dead_columns", "fallback", "precision", "rounded_error", "damped_errors",
        "scale_offsets", "output_error", "rounded_output_error", "output_damping", "cross", "tokens", "rotation", "padding", "seconds",
    ]  # fmt: skip
    assert (report.method, report.format, report.rows, report.cols, report.scales) == ("gptq", "mxfp4", 20, 128, "fpquant_mse, even")
    assert (report.damping, report.damping_asked, report.dead_columns, report.fallback, report.precision, report.tokens) == (0.01, 0.01, 0, None, "float64", None)
    assert 0 < report.relative_error < report.weight_error < 1 and 0 < report.seconds < 60
    assert report.relative_error < report.rounded_error < 1 and len(report.damped_errors) == 1 and (report.rounds, report.cross) == (0, 0.0)


def offsets_by_hand(q, basis):
    """{stored byte minus absmax's: groups}; absmax from ml_dtypes alone, for the rule even a floor of the exponent after half a mantissa bit was added."""
    sixth = np.abs(basis.reshape(len(basis), -1, mg.FORMATS[q.format].group_size)).max(-1) / np.float32(6)
    if q.format == "nvfp4":
        absmax = (sixth * np.float32(q.tensor_scale)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    else:
        mantissa, exponent = np.frexp(sixth.astype(np.float64) * 6)
        absmax = exponent - 1 - 2 + (2 * mantissa >= 1.75) + 127
    steps, counts = np.unique(q.scales.astype(int) - absmax, return_counts=True)
    return dict(zip(steps.tolist(), counts.tolist(), strict=True))


@pytest.mark.parametrize("rotation", [None, 32])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rounds", [0, 3])
def test_the_report_says_which_scales_won_and_what_each_round_gave(format, rotation, rounds):
    """Computed here from the codes: the damped loss with R = H + λI, one dead column weighing as the solver has it, and the scales' distance from absmax."""
    w, x = layer(9, rows=70)
    x[:, 5] = 0
    h = second_moment(x)
    recipe = mg.Recipe(format, rotation=rotation, scales="gptq", order="group", rounds=rounds, damping=0.03)
    q = mg.quantize_layer(w, h, recipe)
    basis, moment = (w, h) if rotation is None else (mg.Hadamard(rotation).apply(w), reference.rotate_hessian(h, rotation))
    assert q.report.dead_columns == (rotation is None)
    assert q.report.scale_offsets == offsets_by_hand(q, basis) and sum(q.report.scale_offsets.values()) == q.scales.size and len(q.report.scale_offsets) > 2
    live = moment.diagonal() != 0
    damped = moment + np.diag(np.full(128, 0.03 * moment.diagonal()[live].mean()))  # a dead column weighs the damping asked, which is more than a hundredth
    last = reference.loss(basis - q.dequantize(), damped) / reference.loss(basis, damped)
    # Sums of 70 * 128² float64 terms; R is positive definite with a condition below 1e4, and e R e^T of a float32 difference is exact to that.
    assert q.report.damped_errors[-1] == pytest.approx(last, rel=1e-6)
    assert q.report.rounds == rounds and len(q.report.damped_errors) == rounds + 1
    assert list(q.report.damped_errors) == sorted(q.report.damped_errors, reverse=True) and len(set(q.report.damped_errors)) == rounds + 1
    for k in range(rounds):  # fewer rounds end where these began
        assert mg.quantize_layer(w, h, replace(recipe, rounds=k)).report.damped_errors == q.report.damped_errors[: k + 1]


@pytest.mark.parametrize("scales", ["hessian", "hessian_block"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rotation", [None, 32])
def test_scales_weighed_by_the_hessian_are_weighed_in_the_layer_s_own_basis(format, scales, rotation):
    w, x = layer(10, rows=300)
    h = second_moment(x * np.exp2(np.random.default_rng(10).integers(-3, 4, 128)))  # columns that differ enough for their weights to matter
    q = mg.quantize_layer(w, h, mg.Recipe(format, rotation=rotation, scales=scales))
    codes, expected, g, _, used = reference.quantize_layer(w, h, format, rotation, scales)
    assert np.array_equal(q.scales, expected) and np.array_equal(mg.unpack(q.codes), codes) and (q.tensor_scale, q.report.damping) == (g, used)
    assert q.report.scales == (scales if format == "nvfp4" else f"{scales}, even")
    plain = mg.quantize_layer(w, h, mg.Recipe(format, rotation=rotation, scales=scales, solver="rtn"))
    assert np.array_equal(plain.scales, q.scales)
    assert not np.array_equal(q.scales, mg.quantize_layer(w, h, mg.Recipe(format, rotation=rotation, scales="mse")).scales)


def test_an_alternating_tensor_scale_is_fitted_where_the_recipe_asks_and_shared_where_one_is_given():
    w, x = layer(11)
    h = second_moment(x)
    recipe = mg.Recipe(rotation=16, scales="mse", tensor_scale="alternating", solver="rtn")
    q, absmax = mg.quantize_layer(w, h, recipe), mg.quantize_layer(w, h, replace(recipe, tensor_scale="absmax"))
    rotated = mg.Hadamard(16).apply(w)
    assert q.tensor_scale == mg.alternating_tensor_scale([rotated], "mse") == reference.alternating_tensor_scale([rotated], "mse")
    assert q.tensor_scale != absmax.tensor_scale == mg.nvfp4_tensor_scale(np.abs(rotated).max())
    assert q.report.weight_error < absmax.report.weight_error  # it starts at absmax and goes on only while the error falls
    shared = mg.shared_tensor_scale([w, 2 * w], recipe)
    assert shared == mg.alternating_tensor_scale([rotated, mg.Hadamard(16).apply(2 * w)], "mse") != q.tensor_scale
    assert mg.quantize_layer(w, h, recipe, tensor_scale=shared).tensor_scale == shared
    # Scales that need a Hessian are not at hand while the tensor scale is fitted; mse stands in.
    for scales, order in (("hessian", "activation"), ("gptq", "group")):
        assert mg.quantize_layer(w, h, replace(recipe, scales=scales, order=order, solver="gptq")).tensor_scale == q.tensor_scale


# ---- Targets moved to the inputs that a layer will see


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rotation", [None, 32])
def test_the_target_moves_to_what_answers_the_new_inputs(format, rotation):
    """X̃ the layer's inputs, X the original's: at 1 the target is the damped least-squares answer, by scipy; the report's errors stay those against W."""
    w, x = layer(12, rows=70)
    noise = np.random.default_rng(12).standard_normal(x.shape).astype(np.float32)
    seen = 0.9 * x + 0.3 * noise[:, ::-1]
    h, cross = second_moment(seen), x.astype(np.float64).T @ seen / len(x)
    turn = np.eye(128) if rotation is None else np.kron(np.eye(4), scipy.linalg.hadamard(32)) / np.sqrt(32)
    basis, h_basis, cross_basis = w if rotation is None else mg.Hadamard(rotation).apply(w), turn.T @ h @ turn, turn.T @ cross @ turn
    r = h_basis + 0.01 * np.mean(h_basis.diagonal()) * np.eye(128)
    for strength in (0.5, 1.0):
        recipe = mg.Recipe(format, rotation=rotation, scales="absmax", cross=strength)
        q = mg.quantize_layer(w, h, recipe, cross=cross)
        target = basis + strength * scipy.linalg.solve(r, (basis @ (cross_basis - h_basis)).T, assume_a="pos").T
        # Its codes are those of a layer whose weight was that target. The two targets, of float64 solutions apart by less than 1e-11 of themselves, round to other float32 numbers once in
        # some ten thousand at most; that one is an ulp off, and a group or a code turns on it only within an ulp of a tie.
        narrow = target.astype(np.float32)
        other = mg.quantize(narrow, format, tensor_scale=q.tensor_scale)
        codes = reference.gptq(narrow, h_basis, np.repeat(reference.steps_of(other.scales, format, other.tensor_scale), reference.GROUP_SIZE[format], axis=1))[0]
        assert np.array_equal(q.scales, other.scales) and np.array_equal(mg.unpack(q.codes), codes)
        assert not np.array_equal(q.codes, mg.quantize_layer(w, h, replace(recipe, cross=0.0)).codes)
        assert q.report.cross == strength
        e, moved = basis.astype(np.float64) - q.dequantize(), target - q.dequantize()
        assert q.report.relative_error == pytest.approx(reference.loss(e, h_basis) / reference.loss(basis, h_basis), rel=1e-5)  # E rounded to float32
        assert q.report.damped_errors[0] == pytest.approx(reference.loss(moved, r) / reference.loss(target, r), rel=1e-5)  # the target rounded to float32
    # What it is for: the answers to the inputs seen come nearer to the original's answers to its own.
    answers = x.astype(np.float64) @ w.T.astype(np.float64)
    gap = [np.square(answers - seen.astype(np.float64) @ m.dequantize(unrotate=True).T).sum() for m in (q, mg.quantize_layer(w, h, replace(recipe, cross=0.0)))]
    assert gap[0] < gap[1]


def test_a_cross_moment_of_the_same_inputs_moves_nothing():
    w, x = layer(13)
    h = second_moment(x)
    recipe = mg.Recipe(rotation=16, cross=1.0)
    with_cross, without = mg.quantize_layer(w, h, recipe, cross=h), mg.quantize_layer(w, h, recipe)
    assert same(with_cross, without) and (with_cross.report.cross, without.report.cross) == (1.0, 0.0)
    assert facts(with_cross.report) | {"cross": 0} == facts(without.report) | {"cross": 0}


INDEFINITE = np.kron([[1.0, 2.5], [2.5, 1.0]], np.eye(32))  # an eigenvalue of -1.5, which no damping up to 1 mends; block rotations leave it as it is


@pytest.mark.parametrize(
    ("scales", "solver", "order", "format", "factorises"),
    [("gptq", "gptq", "group", "nvfp4", True), ("hessian", "gptq", "group", "mxfp4", True), ("hessian", "gptq", "activation", "nvfp4", False), ("absmax", "gptq", "activation", "mxfp4", False), ("quest", "rtn", "activation", "mxfp4", True)],
)
def test_a_rotated_layer_is_that_of_the_rotated_weight(scales, solver, order, format, factorises):
    """The rotation meets every row where it is read; codes, scales, mask and report are those of a weight and a Hessian rotated before."""
    rng, turn = np.random.default_rng(4), mg.Hadamard(32)
    w, outputs = rng.standard_normal((48, 64)).astype(np.float32), rng.standard_normal((96, 48))
    x = rng.standard_normal((200, 64)) @ rng.standard_normal((64, 64))
    h = x.T @ x / 200 if factorises else INDEFINITE
    more = {} if solver == "rtn" or not factorises else {"output_hessian": outputs.T @ outputs}
    recipe = mg.Recipe(format, scales=scales, solver=solver, order=order, rotation=32, rounds=int(order == "group"))
    got, expected = mg.quantize_layer(w, h, recipe, **more), mg.quantize_layer(turn.apply(w), turn.apply_hessian(h), replace(recipe, rotation=None), **more)
    assert (got.report.fallback is None) == factorises == (expected.report.fallback is None)
    assert np.array_equal(got.codes, expected.codes) and np.array_equal(got.scales, expected.scales) and got.tensor_scale == expected.tensor_scale
    assert (got.clip_mask is None and expected.clip_mask is None) if scales != "quest" else np.array_equal(got.clip_mask, expected.clip_mask)
    assert replace(got.report, seconds=0) == replace(expected.report, seconds=0, rotation=32)
    assert (got.report.output_error is None) == (not more)
    if format == "nvfp4":
        assert mg.shared_tensor_scale([w, 3 * w], recipe) == mg.shared_tensor_scale([turn.apply(w), turn.apply(3 * w)], replace(recipe, rotation=None)) != got.tensor_scale
    if scales == "quest":
        rounded = mg.quantize(w, format, scales="quest", rotation=turn)
        assert np.array_equal(rounded.clip_mask, got.clip_mask) and not np.array_equal(mg.quantize(w, format, scales="quest").clip_mask, got.clip_mask)
    with pytest.raises(ValueError, match="row 1 overflows float32 when it is rotated by blocks of 32"):
        mg.quantize_layer(np.where(np.arange(48)[:, None] == 1, np.float32(3e38), w), h, recipe, **more)
