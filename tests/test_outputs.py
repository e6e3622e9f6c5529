"""Output Hessians: rows that make up for each other, against reference.py on leaf, against the conditional optimum written out, and where nothing may change."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mrgptq as mg
from mrgptq import hf, reference
from mrgptq.gptq import OUTPUT_DAMPING, backward_passes
from mrgptq.hf.fisher import _signs
from mrgptq.recipe import BEST_ROUNDS

FORMATS = ["nvfp4", "mxfp4"]


@pytest.fixture(scope="module")
def fisher(leaf_folder, calibration_text):
    """{layer: (rows, rows)} of leaf, over 1024 tokens."""
    model = hf.load_model(leaf_folder)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
    moments = hf.collect_output_hessians(model, hf.token_windows(hf.load_tokenizer(leaf_folder), calibration_text, 8, 128), names, batch_windows=4)
    return {name.removeprefix("model."): moment.matrix for name, moment in moments.items()}


def problem(rows=96, cols=64, seed=0):
    """A weight with moments of correlated inputs and outputs."""
    rng = np.random.default_rng(seed)
    inputs, outputs = rng.standard_normal((4 * cols, cols)) @ rng.standard_normal((cols, cols)), rng.standard_normal((4 * rows, rows)) @ rng.standard_normal((rows, rows))
    return rng.standard_normal((rows, cols)).astype(np.float32), inputs.T @ inputs / len(inputs), outputs.T @ outputs / len(outputs)


def best(format, **fields):
    return replace(mg.Recipe.named("best", format), cross=0.0, **fields)


def form(a, e, h):
    """tr(A E H E^T)."""
    return float(np.einsum("ij,ij->", a @ e, e @ h))


def errors(w, q):
    return w.astype(np.float64) - q.dequantize().astype(np.float64)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_leaf_equals_the_reference_code_for_code(leaf, fisher, format, block):
    names = [name for name in leaf.weights if name.startswith(f"layers.{block}.")]
    assert len(names) == 7
    for i, name in enumerate(names):
        # Seven blocks of rows, six of 16 and a rest of 4, and a round; once all rows there are, so that more is owed than one panel of 128 holds, and as many rounds as the recipe has.
        whole = block == 0 and "up_proj" in name
        rows, rounds = (slice(None), BEST_ROUNDS) if whole else (slice(0, 100), 1)
        w, h, a = leaf.weights[name][rows], leaf.hessians[name], fisher[name][rows, rows]
        # In float64: float32 parts from it near a tie, and which values are that near depends on the machine that ran the model.
        exact = {"precision": "float64", "rounds": rounds}
        for recipe in (best(format, **exact), best(format, **exact | {"rotation": 32, "scales": "mse", "order": "activation", "rounds": 0}))[: 1 + (i % 3 == block % 3)]:
            q = mg.quantize_layer(w, h, recipe, output_hessian=a)
            codes, scales, g, error, _ = reference.quantize_layer(w, h, format, recipe.rotation, recipe.scales, "even", recipe.order, recipe.damping, rounds=recipe.rounds, a=a)
            assert q.tensor_scale == g and np.array_equal(q.scales, scales) and np.array_equal(mg.unpack(q.codes), codes), (name, recipe)
            assert q.report.relative_error == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("damping", [0.05, 0.3])  # of H, which the outputs' own is independent of
@pytest.mark.parametrize("format", FORMATS)
def test_a_block_aims_at_what_is_best_if_the_rows_after_it_had_no_grid(format, damping):
    """With the rows D settled and all others free, tr(A E H E^T) is least at E = -A_RR^-1 A_RD E_D, whatever H is: that much is what the next block has to be moved by."""
    w, h, a = problem()
    recipe = best(format, rounds=2, damping=damping)
    q = mg.quantize_layer(w, h, recipe, output_hessian=a)
    damped = a + OUTPUT_DAMPING * a.diagonal().mean() * np.eye(len(a))
    visit = np.argsort(-a.diagonal(), kind="stable")
    e = errors(w, q)
    for first in range(0, len(w), 16):
        done, own, free = visit[:first], visit[first : first + 16], visit[first:]
        owed = np.linalg.solve(damped[np.ix_(free, free)], damped[np.ix_(free, done)] @ e[done])[:16]
        alone = mg.quantize_layer((w[own] + owed).astype(np.float32), h, recipe, tensor_scale=q.tensor_scale if format == "nvfp4" else None)
        # The target is float64 in the solver and float32 here, so a value beside a tie may part, and what follows it in its row.
        rows_equal = (mg.unpack(alone.codes) == mg.unpack(q.codes)[own]).all(1)
        assert rows_equal.mean() >= 0.9 and (first == 0 or np.abs(owed).max() > 0.01)
    assert first == 80


@pytest.mark.parametrize("format", FORMATS)
def test_the_loss_by_outputs_falls_on_leaf(leaf, fisher, format):
    """By a tenth in the mean at least, which is the least one would take the trouble for; measured was a quarter."""
    ratios = []
    for name in leaf.weights:
        w, h, a = leaf.weights[name], leaf.hessians[name], fisher[name]
        plain, coupled = mg.quantize_layer(w, h, best(format)), mg.quantize_layer(w, h, best(format), output_hessian=a)
        losses = [form(a, errors(w, q), h) for q in (plain, coupled)]
        assert plain.report.output_error is None
        assert coupled.report.output_error == pytest.approx(losses[1] / form(a, w.astype(np.float64), h), rel=1e-6)  # errors are float32 there
        ratios.append(losses[1] / losses[0])
    assert len(ratios) == 28 and np.mean(ratios) < 0.9


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_where_outputs_are_alike_or_few_nothing_changes(format, precision):
    w, h, a = problem(64)
    recipe = best(format, precision=precision)

    def same(p, q):
        return p.codes.tobytes() == q.codes.tobytes() and p.scales.tobytes() == q.scales.tobytes()

    plain = mg.quantize_layer(w, h, recipe)
    assert not same(plain, mg.quantize_layer(w, h, recipe, output_hessian=a))
    # Outputs of different weight that have nothing to do with each other; then none that matters; then a block that is all there is.
    assert same(plain, mg.quantize_layer(w, h, recipe, output_hessian=np.diag(a.diagonal())))
    assert same(plain, mg.quantize_layer(w, h, recipe, output_hessian=np.zeros_like(a)))
    few = mg.quantize_layer(w[:16], h, recipe, tensor_scale=plain.tensor_scale if format == "nvfp4" else None, output_hessian=a[:16, :16])
    assert few.codes.tobytes() == plain.codes[:16].tobytes()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_threads_and_the_scale_of_the_moment_change_no_byte(format, precision):
    w, h, a = problem(600, 96)  # 32 rows a block: 18 blocks and a rest
    one = mg.quantize_layer(w, h, best(format, precision=precision), output_hessian=a, threads=1)
    for other in (
        mg.quantize_layer(w, h, best(format, precision=precision), output_hessian=a, threads=2),
        mg.quantize_layer(w, h, best(format, precision=precision), output_hessian=a, threads=7),
        mg.quantize_layer(w, h, best(format, precision=precision), output_hessian=0.25 * a, threads=3),
    ):
        assert one.codes.tobytes() == other.codes.tobytes() and one.scales.tobytes() == other.scales.tobytes()
        assert one.report.output_error == other.report.output_error and one.report.damped_errors == other.report.damped_errors


@pytest.mark.parametrize("format", FORMATS)
def test_rows_make_up_for_each_other_towards_a_shifted_target_too(format):
    """With cross the target is moved first, and rows are coupled around it; errors are still those against the weight."""
    w, h, a = problem()
    rng = np.random.default_rng(5)
    cross = h + 0.1 * rng.standard_normal(h.shape) * h.diagonal().mean()
    recipe = best(format)
    divisor = mg.quantize_layer(w, h, recipe).tensor_scale
    moved = reference.shifted_target(w, h, cross, recipe.damping, 0.5)
    q = mg.quantize_layer(w, h, replace(recipe, cross=0.5), tensor_scale=divisor if format == "nvfp4" else None, cross=cross, output_hessian=a)
    alone = mg.quantize_layer(moved, h, recipe, tensor_scale=divisor if format == "nvfp4" else None, output_hessian=a)
    # float32 targets may be an ulp apart, which may tip a code at a tie, and with it every block after
    assert (mg.unpack(q.codes) == mg.unpack(alone.codes)).mean() > 0.9
    assert not np.array_equal(q.codes, mg.quantize_layer(w, h, replace(recipe, cross=0.5), cross=cross).codes)
    energy = form(a, w.astype(np.float64), h)
    # the report's errors are float32 differences
    assert q.report.output_error == pytest.approx(form(a, errors(w, q), h) / energy, rel=1e-6)
    assert q.report.rounded_output_error == pytest.approx(form(a, errors(w, mg.quantize(w, format)), h) / energy, rel=1e-6)


def test_a_raised_damping_and_a_moment_of_nothing_are_in_the_report():
    w, h, a = problem(32)
    assert mg.quantize_layer(w, h, best("nvfp4"), output_hessian=a).report.output_damping == OUTPUT_DAMPING
    assert mg.quantize_layer(w, h, best("nvfp4")).report.output_damping is None
    b = np.eye(32)
    b[:16, 16:] = b[16:, :16] = 1.3 * np.eye(16)  # eigenvalues -0.3
    raised = mg.quantize_layer(w, h, best("nvfp4"), output_hessian=b).report
    assert raised.output_damping == 0.5 and raised.fallback is None
    shown = {line.split("  ")[1].strip(): line.split()[-1] for line in repr(raised).splitlines()[1:]}
    assert float(shown["by outputs"]) == pytest.approx(raised.output_error, rel=1e-3) and float(shown["by outputs, rounded"]) == pytest.approx(raised.rounded_output_error, rel=1e-3)
    assert shown["output damping"] == "0.5" and raised.output_error < 0.9 * raised.rounded_output_error
    nothing = mg.quantize_layer(w, h, best("nvfp4"), output_hessian=np.zeros((32, 32))).report
    assert "outputs counted alike: the output Hessian is zero" in nothing.fallback and nothing.output_error is None


def test_an_output_that_never_matters_stands_alone():
    w, h, a = problem(64)
    a[5], a[:, 5] = 0, 0
    rest = np.delete(np.arange(64), 5)
    plain, coupled = mg.quantize_layer(w, h, best("mxfp4")), mg.quantize_layer(w, h, best("mxfp4"), output_hessian=a)
    assert np.array_equal(plain.codes[5], coupled.codes[5]) and not np.array_equal(plain.codes[rest], coupled.codes[rest])
    assert coupled.report.fallback is None


def test_an_output_hessian_of_a_class_is_read_as_its_matrix():
    w, h, _ = problem(32)
    gradients = np.random.default_rng(1).standard_normal((100, 32)).astype(np.float32)
    moment = mg.Hessian(32)
    moment.update(gradients)
    one, other = (mg.quantize_layer(w, h, best("nvfp4"), output_hessian=a) for a in (moment, moment.matrix))
    assert one.codes.tobytes() == other.codes.tobytes() and one.report.output_error == other.report.output_error


def test_one_that_cannot_be_factorised_is_named_in_the_report():
    w, h, _ = problem(32)
    a = np.eye(32)
    a[:16, 16:] = a[16:, :16] = 100 * np.eye(16)  # eigenvalues -99
    q = mg.quantize_layer(w, h, best("nvfp4"), output_hessian=a)
    assert "outputs counted alike" in q.report.fallback
    assert q.codes.tobytes() == mg.quantize_layer(w, h, best("nvfp4")).codes.tobytes()


def test_refusals():
    w, h, a = problem(32)
    with pytest.raises(ValueError, match=r"output_hessian has shape \(31, 31\); a weight of 32 rows needs \(32, 32\)"):
        mg.quantize_layer(w, h, "best", output_hessian=a[:31, :31])
    with pytest.raises(ValueError, match="output_hessian has shape .* square"):
        mg.quantize_layer(w, h, "best", output_hessian=a[:31])
    with pytest.raises(ValueError, match="output_hessian is not symmetric"):
        mg.quantize_layer(w, h, "best", output_hessian=np.triu(a))
    with pytest.raises(ValueError, match="output_hessian is nan at row 0, column 1"):
        mg.quantize_layer(w, h, "best", output_hessian=np.where((np.arange(32) == 1) & (np.arange(32)[:, None] == 0), np.nan, a))
    with pytest.raises(ValueError, match='output_hessian is given, but the recipe\'s solver is "rtn"'):
        mg.quantize_layer(w, h, "rtn", output_hessian=a)
    with pytest.raises(ValueError, match="output_hessian 'fisher' needs the solver \"gptq\""):
        mg.Recipe("nvfp4", scales="absmax", solver="rtn", output_hessian="fisher")
    with pytest.raises(ValueError, match="output_hessian"):
        mg.Recipe("nvfp4", output_hessian="kfac")


# ---- Where the moments come from


class Tiny(torch.nn.Module):
    """Two linear layers with a look back of one token between them, and four words: small enough to write its Fisher information out."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = torch.nn.Embedding(4, 3)
        self.first, self.head = torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(5, 4, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def tail(self, hidden):
        return self.head(torch.tanh(hidden + 0.5 * torch.roll(hidden, 1, -2) * torch.tensor([[0.0], [1.0]])))

    def forward(self, input_ids, use_cache):
        return type("Output", (), {"logits": self.tail(self.first(self.embedding(input_ids)))})


def test_moments_are_the_fisher_information(monkeypatch):
    """Every pattern of signs once, one a window: their mean is exact, and so must the moment be, J^T (diag p - p p^T) J summed over the tokens that a token's output reaches."""
    model = Tiny()
    tokens = torch.tensor([[2, 1]])
    patterns = torch.tensor([[1 - 2 * (i >> k & 1) for k in range(8)] for i in range(256)], dtype=torch.float32).reshape(256, 2, 4)
    monkeypatch.setattr("mrgptq.hf.fisher._signs", lambda window, shape: patterns[window])
    model.eval()
    moment = hf.collect_output_hessians(model, tokens.repeat(256, 1), ["first"], batch_windows=32)["first"]
    with torch.no_grad():
        hidden = model.first(model.embedding(tokens))[0].double()
        p = torch.softmax(model.double().tail(hidden), -1)
        jacobian = torch.autograd.functional.jacobian(model.tail, hidden)  # (token, word, token, output)
    expected = np.zeros((5, 5))
    for at in range(2):
        for of in range(2):
            j, q = jacobian[of, :, at].numpy(), p[of].numpy()
            expected += j.T @ (np.diag(q) - np.outer(q, q)) @ j / 2  # a token's mean
    assert moment.tokens == 512
    # float32 products of a few terms
    assert np.abs(moment.matrix - expected).max() <= 64 * 2.0**-24 * np.abs(expected).max() and np.abs(expected).max() > 0.01


def test_signs_are_signs_and_each_window_has_its_own():
    signs = [_signs(window, torch.Size((500, 20))) for window in range(3)]
    for i, own in enumerate(signs):
        assert set(own.unique().tolist()) == {-1.0, 1.0} and torch.equal(own, _signs(i, torch.Size((500, 20))))
        assert abs(float(own.mean())) < 5 / 100  # five standard errors
        for other in signs[:i]:
            assert abs(float((own * other).mean())) < 5 / 100


def test_outputs_that_the_model_changes_in_place_are_seen_before_the_change():
    """OLMo clips q, k and v in place."""
    model, plain = Tiny(), Tiny()
    plain.tail = lambda hidden: Tiny.tail(plain, hidden.clamp(-0.5, 0.5))
    model.tail = lambda hidden: Tiny.tail(model, hidden.clamp_(-0.5, 0.5))
    tokens = torch.tensor([[2, 1], [0, 3]])
    one, two = (hf.collect_output_hessians(m.eval(), tokens, ["first"])["first"].matrix for m in (model, plain))
    free = hf.collect_output_hessians(Tiny().eval(), tokens, ["first"])["first"].matrix
    assert np.array_equal(one, two) and not np.array_equal(one, free)


def test_gradients_are_refused_where_there_are_none(leaf_folder):
    model, inputs = hf.load_model(leaf_folder), torch.zeros((1, 4), dtype=torch.int64)
    name = "model.layers.0.self_attn.q_proj"
    for words, arguments in {
        "model.norm is not a linear layer": (model, inputs, ["model.norm"]),
        "nowhere is not a linear layer": (model, inputs, ["nowhere"]),
        "modules is empty": (model, inputs, []),
        r"inputs has shape \(0, 4\)": (model, inputs[:0], [name]),
        "has no head": (model.model, inputs, [name.removeprefix("model.")]),
    }.items():
        with pytest.raises(ValueError, match=words):
            hf.collect_output_hessians(*arguments)
    with pytest.raises(ValueError, match="batch_windows is 0"):
        hf.collect_output_hessians(model, inputs, [name], batch_windows=0)
    with pytest.raises(ValueError, match="training mode"):
        hf.collect_output_hessians(model.train(), inputs, [name])


def test_blocks_share_a_backward_pass_as_far_as_their_matrices_fit():
    """4 GiB are 2^29 float64: two blocks of 2^28 and no more, then one that is too large alone."""
    assert backward_passes([[16384], [16384], [16384], [20000, 20000], [8], [4096]]) == [[0, 1], [2], [3], [4, 5]]
    assert backward_passes([[16384], [16384, 1]]) == [[0], [1]]
    assert backward_passes([]) == []


def test_the_model_is_left_as_it_was_and_batches_do_not_matter(leaf_folder, calibration_text):
    model = hf.load_model(leaf_folder)
    model.model.norm.weight.requires_grad_(False)
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    inputs = hf.token_windows(hf.load_tokenizer(leaf_folder), calibration_text, 4, 32)
    names, done = ["model.layers.1.self_attn.q_proj", "model.layers.3.mlp.down_proj"], []
    one = hf.collect_output_hessians(model, inputs, names, batch_windows=3, progress=lambda *windows: done.append(windows))
    two = hf.collect_output_hessians(model, inputs, names)
    assert done == [(3, 4), (4, 4)] and [parameter.requires_grad for parameter in model.parameters()] == trainable and len(set(trainable)) == 2
    assert all(parameter.grad is None for parameter in model.parameters()) and not any(module._forward_hooks for module in model.modules())
    for name in names:
        assert one[name].tokens == two[name].tokens == 128
        # batches change the last bits of float32 passes
        assert np.abs(one[name].matrix - two[name].matrix).max() <= 1e-4 * np.abs(two[name].matrix).max()


def test_calibration_hands_them_to_the_layers(leaf_folder, calibration_text, monkeypatch):
    inputs = hf.token_windows(hf.load_tokenizer(leaf_folder), calibration_text, 3, 64)
    names = [f"model.layers.{i}.mlp.{name}" for i in (0, 1, 3) for name in ("gate_proj", "down_proj")]
    recipe = mg.Recipe("nvfp4", scales="gptq", order="group", output_hessian="fisher")
    moments = hf.collect_output_hessians(hf.load_model(leaf_folder), inputs, names)

    def run():
        stages = []
        matrices = dict(hf.calibrate(hf.load_model(leaf_folder), inputs, recipe, names, progress=lambda *stage: stages.append(stage)))
        return matrices, stages

    matrices, stages = run()
    assert stages == [("gradients", i, 3) for i in (1, 2, 3)] + [("quantise", i, 6) for i in range(1, 7)]
    hessian = hf.collect_hessians(hf.load_model(leaf_folder), inputs, names[:1])[names[0]]
    weight = hf.layer_weights(hf.load_model(leaf_folder), names[:1])[names[0]]
    alone = mg.quantize_layer(weight, hessian, recipe, output_hessian=moments[names[0]])
    assert matrices[names[0]].report.output_error == pytest.approx(alone.report.output_error, rel=1e-3)
    # Room for one block's matrices: a pass for each block that has layers, through a model whose earlier blocks are quantised by then.
    monkeypatch.setattr("mrgptq.gptq.OUTPUT_HESSIAN_BYTES", 1)
    split, stages = run()
    assert [stage for stage in stages if stage[0] == "gradients"] == [("gradients", i, 3) for _ in range(3) for i in (1, 2, 3)]
    for name, q in split.items():
        changed = q.report.output_error != matrices[name].report.output_error
        assert changed == (".layers.0." not in name)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_both_factors_have_the_precision_of_the_recipe(monkeypatch, precision):
    made = []

    class Noted(mg.Factor):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append((self.cols, self.precision))

    monkeypatch.setattr("mrgptq.layer.Factor", Noted)
    w, h, a = problem()
    mg.quantize_layer(w, h, best("nvfp4", precision=precision), output_hessian=a)
    assert sorted(made) == [(64, precision), (96, precision)]
