"""The method grid: each cell against a few lines of NumPy, GPTQ over any grid against the reference, and the grid whole on leaf."""

import dataclasses
import math
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from scipy import fft, linalg

import mrgptq as mg
from mrgptq import hf, reference
from mrgptq.study import bases, solver
from mrgptq.study.grids import E2M1, FORMATS, INT4
from mrgptq.study.methods import AWQ_ALPHAS, METHOD_FORMATS, METHODS, by_method, cells, grid
from mrgptq.study.roundings import Fp4, Gridded

QKV = tuple(f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkv")
ROUNDINGS = {"nvfp4": Fp4("nvfp4"), "mxfp4": Fp4("mxfp4"), **{name: Gridded(FORMATS[name]) for name in ("int4", "mxint4", "nvint4")}}
GROUP = {"nvfp4": 16, "mxfp4": 32, "int4": 32, "mxint4": 32, "nvint4": 16}


def hadamard(size):
    return linalg.hadamard(size) / np.sqrt(size)


# ---- Bases

BASES = {
    "block Hadamard": (bases.block_hadamard(16), linalg.block_diag(*[hadamard(16)] * 24)),
    "over all columns, 384 = 3 · 128": (bases.full_hadamard(384), np.kron(fft.dct(np.eye(3), norm="ortho"), hadamard(128))),
    "over all columns, 32": (bases.full_hadamard(32), hadamard(32)),
    "over all columns, 15": (bases.full_hadamard(15), fft.dct(np.eye(15), norm="ortho")),
    "scales": (bases.Diagonal(np.linspace(0.01, 9, 64)), np.diag(1 / np.linspace(0.01, 9, 64))),
    "none": (bases.UNCHANGED, np.eye(8)),
}


@pytest.mark.parametrize("name", BASES)
def test_a_basis_leaves_products_as_they_are(name):
    """And is the matrix that it says, for inputs, weights and second moments."""
    basis, t = BASES[name]
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 5, len(t))), rng.standard_normal((7, len(t)))
    np.testing.assert_allclose(basis.inputs(x), x @ t, atol=1e-10)
    np.testing.assert_allclose(basis.inputs(x) @ basis.weights(w).T, x @ w.T, atol=1e-11)
    for there, back, values in ((basis.inputs, basis.restore_inputs, x), (basis.weights, basis.restore_weights, w)):
        np.testing.assert_allclose(back(there(values)), values, atol=1e-12)
        assert there(values.astype(np.float32)).dtype == np.float32
    h = x.reshape(-1, len(t)).T @ x.reshape(-1, len(t))
    turned = bases.turned_hessian(basis, h)
    np.testing.assert_allclose(turned, t.T @ h @ t, rtol=1e-9, atol=1e-9)
    assert np.array_equal(turned, turned.T)


def test_scales_of_columns_without_inputs_or_weights_are_one():
    w, largest = [np.array([[1.0, 0, -2, 4]]), np.array([[-3.0, 0, 1, 0]])], np.array([2.0, 5, 0, 1])
    np.testing.assert_allclose(bases.smoothing(w, largest, 0.6).scales, [2**0.6 / 3**0.4, 1, 1, 1 / 4**0.4], rtol=1e-12)
    np.testing.assert_allclose(bases.magnified(np.array([4.0, 0, 16, 1]), 0.5).scales, [1, 1, 2, 0.5], rtol=1e-12)  # 2, 4 and 1 over their √(4 · 1)
    np.testing.assert_array_equal(bases.magnified(np.zeros(3), 0.5).scales, 1)


# ---- GPTQ over any grid


def steps_of(w):
    return np.repeat(reference.steps_of(reference.find_scales(w, "mxfp4"), "mxfp4", np.float32(1)), 32, axis=1)


@pytest.mark.parametrize("layer", ["layers.0.mlp.down_proj", "layers.2.self_attn.q_proj"])
def test_gptq_is_the_references(layer, leaf):
    """On MXFP4's powers of two, whose products are exact in float32 too; 384 columns are three blocks."""
    w, h = leaf.weights[layer], leaf.hessians[layer].copy()
    for dead in ([], [0, 5, 100]):
        h[dead], h[:, dead] = 0, 0
        steps = steps_of(w)
        codes, _, used = reference.gptq(w, h, steps)
        assert used == 0.01
        values = solver.gptq(w.astype(np.float64), h, E2M1, steps.astype(np.float64))
        np.testing.assert_array_equal(values, steps * reference.decode_e2m1(codes))
        assert (values != E2M1.round(w / steps) * steps).mean() > 0.05


def test_gptq_is_the_textbooks(leaf):
    w, h = leaf.weights["layers.1.mlp.up_proj"], leaf.hessians["layers.1.mlp.up_proj"]
    steps = steps_of(w)
    values = solver.gptq(w.astype(np.float64), h, E2M1, steps.astype(np.float64))
    np.testing.assert_array_equal(values, steps * reference.decode_e2m1(reference.gptq_textbook(w, h, steps)))


def test_damping_rises_as_the_references():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((20, 40))
    singular, indefinite = x.T @ x, np.ones((40, 40)) - 2 * np.diag(rng.uniform(0, 0.4, 40))
    for h, damping in ((singular, 0), (singular, 0.01), (indefinite, 0.001), (indefinite * 1.0 - 9 * (1 - np.eye(40)), 0.01), (np.zeros((40, 40)), 0.01)):
        visit, expected, _ = reference.factorise(h, "activation", damping)
        columns, lower = solver.factorise(h, damping)
        assert np.array_equal(columns, visit[::-1]) and (lower is None) == (expected is None)
        if lower is not None and h.any():
            np.testing.assert_allclose(lower, expected, rtol=1e-9, atol=1e-12)
    w = rng.standard_normal((3, 40))
    np.testing.assert_array_equal(solver.gptq(w, -np.ones((40, 40)) + 2 * np.eye(40), E2M1, np.full(w.shape, 0.5)), E2M1.round(w / 0.5) * 0.5)  # no damping helps


# ---- INT4


def int4(x):
    """Groups of 32 along the last axis, a float16 scale each, codes from -7 to 7."""
    groups = x.astype(np.float64).reshape(-1, 32)
    scale = (np.abs(groups).max(1, keepdims=True) / 7).astype(np.float16).astype(np.float64)
    return (np.clip(np.rint(groups / scale), -7, 7) * scale).reshape(x.shape).astype(np.float32)


def test_int4_inputs_by_hand():
    x = np.zeros((2, 1, 64), np.float32)
    x[0, 0, :5], x[0, 0, 32:35], x[1, 0, 40:43] = [7, -2.5, 1.5, 0.49, -9 / 2], [0.1, -0.35, 0.04], [1e-9, 3e9, 1]
    got = ROUNDINGS["int4"].inputs(x)
    np.testing.assert_array_equal(got[0, 0, :5], [7, -2, 2, 0, -4])
    np.testing.assert_allclose(got[0, 0, 32:35], np.float64(np.float16(0.05)) * np.array([2, -7, 1]), rtol=1e-7)
    np.testing.assert_array_equal(got[1, 0, 40:43], [0, 7 * 65504, 0])  # float16 ends there, and what is beyond saturates
    assert np.isfinite(ROUNDINGS["int4"].inputs(np.full(32, 1e-12, np.float32))).all()
    random = np.random.default_rng(2).standard_normal((4, 9, 64)).astype(np.float32)
    np.testing.assert_array_equal(ROUNDINGS["int4"].inputs(random), int4(random))


def test_integers_round_as_any_grid_does():
    """Beside the definition by middles, ties among them."""
    x = np.concatenate([np.arange(-20, 20) / 2, np.random.default_rng(3).uniform(-9, 9, 1000)])
    values = np.array(INT4.magnitudes)
    distance = np.abs(np.abs(x)[:, None] - values)
    tied = distance == distance.min(1, keepdims=True)
    np.testing.assert_array_equal(np.abs(INT4.round(x)), (tied & ((values % 2 == 0) | (tied.sum(1, keepdims=True) == 1))) @ values)


# ---- One input's layers, cell by cell


def rounded(format, tensors, gptq_hessian=None, largest=None):
    """Few lines for tensors under one tensor scale, by the reference where it has the format."""
    if "int" in format:
        whole = max(float(np.abs(x).max()) for x in tensors) if largest is None else float(largest)
        steps = [integer_steps(format, x, whole) for x in tensors]
        return [(np.clip(np.rint(x / s), -7, 7) * s).astype(np.float32) if gptq_hessian is None else plain_gptq(x, gptq_hessian, s) for x, s in zip(tensors, steps, strict=True)]
    g = reference.tensor_scale(np.concatenate([x.reshape(-1) for x in tensors]) if largest is None else np.float32(largest), format)
    answers = []
    for x in tensors:
        flat = x.reshape(-1, x.shape[-1])
        scales = reference.find_scales(flat, format, g=g)
        steps = np.repeat(reference.steps_of(scales, format, g), GROUP[format], axis=1)
        codes = reference.encode_e2m1(flat / steps) if gptq_hessian is None else reference.gptq(flat, gptq_hessian, steps)[0]
        answers.append(reference.dequantize(codes, scales, format, g).reshape(x.shape))
    return answers


def integer_steps(format, x, largest):
    """Of the groups of (..., cols) values, as wide as they: absmax / 7 in float16, the power of two that is no less, and in E4M3 where the tensor's largest group has 448."""
    seventh = np.abs(x).reshape(*x.shape[:-1], -1, GROUP[format]).max(-1).astype(np.float64) / 7
    if format == "int4":
        steps = seventh.astype(np.float16).astype(np.float64)
    elif format == "mxint4":
        steps = 2.0 ** np.ceil(np.log2(seventh))
    else:
        steps = np.minimum(seventh * (7 * 448 / largest), 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) / (7 * 448 / largest)
    return np.repeat(steps, GROUP[format], axis=-1)


def plain_gptq(w, h, steps):
    """INT4's GPTQ as the textbook has it."""
    visit = reference.visiting_order(h, "activation")
    upper = np.linalg.cholesky(np.linalg.inv(reference.damped(h, 0.01)[np.ix_(visit, visit)])).T
    t, values = w.astype(np.float64), np.empty(w.shape)
    for i, c in enumerate(visit):
        values[:, c] = np.clip(np.rint(t[:, c] / steps[:, c]), -7, 7) * steps[:, c]
        t[:, visit[i:]] -= np.outer((t[:, c] - values[:, c]) / upper[i, i], upper[i, i:])
    return values.astype(np.float32)


@pytest.fixture(scope="module")
def inputs(leaf_folder, calibration_text):
    return hf.token_windows(hf.load_tokenizer(leaf_folder), calibration_text, 6, 128)


@pytest.fixture(scope="module")
def first(leaf_folder, inputs):
    """Weights of the first block's q, k and v, their inputs (tokens, cols) and the inputs' second moment."""
    model, seen = hf.load_model(leaf_folder), []
    model.get_submodule(QKV[0]).register_forward_pre_hook(lambda module, args: seen.append(args[0].reshape(-1, module.in_features).numpy()))
    with torch.no_grad():
        model(inputs)
    return [model.get_submodule(name).weight.detach().numpy().copy() for name in QKV], seen[0], seen[0].T.astype(np.float64) @ seen[0] / len(seen[0])


def form(e, h):
    return np.einsum("ij,jk,ik->", e, h, e.astype(np.float64), optimize=True)


def matrix_of(method, format, weights, x, h):
    """T of a method."""
    cols, largest, mean = x.shape[1], np.abs(x).max(0), np.abs(x).mean(0, dtype=np.float64)
    if method in ("rtn-hadamard", "mr-gptq"):
        return linalg.block_diag(*[hadamard(GROUP[format])] * (cols // GROUP[format]))
    if method == "quarot":
        return hadamard(cols)  # 128 columns are a power of two
    if method == "smoothquant":
        return np.diag(np.abs(np.concatenate(weights)).max(0) ** 0.4 / largest.astype(np.float64) ** 0.6)
    if method == "awq":
        tried = {}
        for alpha in AWQ_ALPHAS:
            s = mean**alpha / np.sqrt((mean**alpha).max() * (mean**alpha).min())
            values = rounded(format, [(w * s).astype(np.float32) for w in weights])
            tried[alpha] = sum(form(w - q / s, h) for w, q in zip(weights, values, strict=True)), s
        least, s = min(tried.values(), key=lambda pair: pair[0])
        assert least < tried[0.0][0] and len({loss for loss, _ in tried.values()}) == 20, "else the choice says nothing"
        return np.diag(1 / s)
    return np.eye(cols)


CELLS = [(method, format) for method in METHODS for format in GROUP if METHODS[method] and (method != "mr-gptq" or "int" in format)]


@pytest.mark.parametrize(("method", "format"), CELLS)
def test_a_cell_is_its_definition(method, format, first, inputs, leaf_folder):
    """Weights, errors, and at W4A4 what layers answer. In the basis, where a value within float32 rounding of a tie goes the other way: of 32 768 weights a few."""
    weights, x, h = first
    t = matrix_of(method, format, weights, x, h)
    inverse = np.linalg.inv(t)
    turned = [(w @ inverse.T).astype(np.float32) for w in weights]
    expected = rounded(format, turned, t.T @ h @ t if METHODS[method].solves else None)
    for inputs_too in (False, True):
        model = hf.load_model(leaf_folder)
        errors = list(by_method(METHODS[method], ROUNDINGS[format], inputs_too)(model, inputs, list(QKV)))
        modules = [model.get_submodule(name) for name in QKV]
        for w, values, module, error in zip(weights, expected, modules, errors, strict=True):
            got = module.weight.detach().numpy()
            off = ~np.isclose(got @ inverse.T, values, rtol=1e-4, atol=1e-5 * np.abs(values).max())
            # One flip in GPTQ moves what is left of its row; one of a scale, which float16 rounds too, its group, of which the smallest layer has 256.
            assert off.mean() < (0.02 if METHODS[method].solves else 0.01)
            assert error == pytest.approx(form(w - got, h) / form(w, h), rel=1e-4)  # the Hessian's products are float32
        if inputs_too:
            turned_x = (x @ t).astype(np.float32)
            (read,) = rounded(format, [turned_x], largest=np.abs(turned_x).max())
            with torch.no_grad():
                answers = modules[0](torch.from_numpy(x)).numpy()
            wanted = (read @ inverse) @ modules[0].weight.detach().numpy().T
            assert np.abs(answers - x @ weights[0].T).mean() > 20 * np.abs(answers - wanted).mean() and np.median(np.abs(answers - wanted)) < 1e-5 * np.abs(wanted).max()
            # Scales are the calibration's: what is larger than anything seen saturates in NVFP4 alone.
            with torch.no_grad():
                louder = modules[0](torch.from_numpy(4 * x[:8])).numpy()
            (read,) = rounded(format, [4 * turned_x[:8]], largest=np.abs(turned_x).max())
            wanted = (read @ inverse) @ modules[0].weight.detach().numpy().T
            assert np.median(np.abs(louder - wanted)) < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(("format", "activations"), [("nvfp4", None), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4")])
def test_gptq_without_a_basis_is_calibrations(format, activations, leaf_folder, inputs):
    """Every layer of the model, to the bit: blocks hand on what they do in calibration, and Hessians are of the same inputs."""
    ours, theirs = hf.load_model(leaf_folder), hf.load_model(leaf_folder)
    names = [name for name, module in ours.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    errors = list(by_method(METHODS["gptq"], ROUNDINGS[format], activations is not None)(ours, inputs, names))
    matrices = dict(hf.calibrate(theirs, inputs, mg.Recipe.named("gptq", format, activations=activations), names))
    assert len(errors) == 28 and errors == pytest.approx([matrix.report.relative_error for matrix in matrices.values()], rel=1e-5)
    for name in names:
        assert torch.equal(ours.get_submodule(name).weight, theirs.get_submodule(name).weight), name
    with torch.no_grad():
        assert torch.equal(ours(inputs[:1]).logits, theirs(inputs[:1]).logits)


# ---- The grid


@pytest.fixture(scope="module")
def held_out_text(leaf_folder):
    return (leaf_folder.parent.parent / "text" / "test.txt").read_text(encoding="utf-8")


def test_the_grid_has_every_cell_once(leaf_folder, calibration_text, held_out_text):
    stages = []
    original, *rows = grid(leaf_folder, calibration_text, held_out_text, windows=4, test_windows=2, sequence=128, progress=stages.append)
    assert (original.method, original.format, original.relative_error, original.divergence) == ("original", None, None, 0)
    keys = [(row.method, row.format, row.activations) for row in rows]
    assert keys == cells() and len(set(keys)) == len(keys) == 50 and ("best", "int4", None) not in keys and ("best", "mxfp4", "mxfp4") in keys
    assert cells(["best", "gptq"], ["nvint4", "mxint4"]) == [("gptq", format, activations) for format in ("nvint4", "mxint4") for activations in (None, format)]
    assert len(stages) == 51 and stages[:3] == ["original", "rtn, nvfp4, W4A16", "rtn, nvfp4, W4A4"]
    for row in rows:
        assert math.isfinite(row.perplexity) and 0 < row.divergence < 5 and 0 < row.relative_error < 0.05 and row.seconds > 0, row
        assert len(row.window_divergences) == 2 and row.divergence == pytest.approx(np.mean(row.window_divergences), rel=1e-12)
    difference = rows[0].divergence_over(rows[-1])
    assert difference.value == pytest.approx(rows[0].divergence - rows[-1].divergence) and difference.standard_error == pytest.approx(abs(np.diff(np.subtract(rows[0].window_divergences, rows[-1].window_divergences))[0]) / 2)
    found = dict(zip(keys, rows, strict=True))
    for format in METHOD_FORMATS:
        for activations in (None, format):
            plain, solved, turned = (found[method, format, activations] for method in ("rtn", "gptq", "mr-gptq"))
            assert solved.relative_error < 0.8 * plain.relative_error and turned.relative_error < 0.8 * found["rtn-hadamard", format, activations].relative_error
        assert found["rtn", format, format].divergence > found["rtn", format, None].divergence


def test_recipes_are_what_their_names_say(leaf_folder, calibration_text, held_out_text, monkeypatch):
    """MR-GPTQ and best are the package's own, in the formats that it has."""
    asked = []
    monkeypatch.setattr("mrgptq.study.methods.by_recipe", lambda recipe, threads: asked.append(recipe) or (lambda *arguments: []))
    list(grid(leaf_folder, calibration_text, held_out_text, methods=["mr-gptq", "best", "best-hadamard"], formats=["nvfp4", "mxfp4"], windows=1, test_windows=1, sequence=16))
    expected = []
    for format, size in (("nvfp4", 16), ("mxfp4", 32)):
        for name in ("mr-gptq", "best"):
            expected += [mg.Recipe.named(name, format, activations=activations) for activations in (None, format)]
        expected += [dataclasses.replace(recipe, rotation=size) for recipe in expected[-2:]]
    assert asked == expected and expected[0].rotation == 16 and expected[2].rotation is None


def test_what_the_grid_has_not_is_refused(leaf_folder, calibration_text, held_out_text, tmp_path):
    """At once, not when the first row is asked for."""
    for choice, words in (
        ({"methods": ["rtn", "spinquant"]}, ("spinquant", "rtn", "quarot")),
        ({"formats": ["int8"]}, ("int8", "nvfp4", "int4")),
        ({"methods": ["best"], "formats": ["int4"]}, ("best", "int4", "no such cell")),
    ):
        with pytest.raises(ValueError) as refusal:
            grid(leaf_folder, calibration_text, held_out_text, **choice)
        assert all(word in str(refusal.value) for word in words)
    config = transformers.LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=1024)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(leaf_folder / name, tmp_path)
    sizes = {"methods": ["rtn"], "windows": 1, "test_windows": 1, "sequence": 16}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\S+ has 48 columns; mxfp4 needs a multiple of 32"):
        grid(tmp_path, calibration_text, held_out_text, **sizes)
    assert [row.format for row in grid(tmp_path, calibration_text, held_out_text, formats=["nvfp4"], **sizes)] == [None, "nvfp4", "nvfp4"]
