"""What the measurements rest on: divergence against the sum over the vocabulary, second moments and weights against transformers' own, layer rows against the layers' reports."""

import gc

import numpy as np
import pytest
import torch

import mrgptq as mg
from mrgptq import hf
from mrgptq.study.layers import compare_layers

NAMES = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")]


@pytest.fixture(scope="module")
def model_and_inputs(leaf_folder, calibration_text):
    return hf.load_model(leaf_folder), hf.token_windows(hf.load_tokenizer(leaf_folder), calibration_text, 3, 64)


def test_divergence_is_that_of_the_original_from_the_other_per_token(model_and_inputs, leaf_folder):
    original, inputs = model_and_inputs
    other = hf.load_model(leaf_folder)
    with torch.no_grad():
        other.get_submodule(NAMES[-1]).weight.mul_(0.5)
        p, q = (torch.softmax(m(input_ids=inputs).logits.double(), -1) for m in (original, other))
    expected = float((p * (p.log() - q.log())).sum(-1).mean())
    backwards = float((q * (q.log() - p.log())).sum(-1).mean())
    # float32 log-probabilities are off by some 1e-6, and 1024 of them are weighed by probabilities that sum to one
    assert hf.divergence(other, original, inputs) == pytest.approx(expected, abs=1e-5) and abs(expected - backwards) > 1e-4
    assert hf.divergence(original, original, inputs) == 0


def test_moments_weights_and_layer_rows_are_the_layers_own(model_and_inputs):
    model, inputs = model_and_inputs
    seen = {}
    handles = [model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1).double().numpy())) for name in NAMES]
    with torch.no_grad():
        model(input_ids=inputs)
    for handle in handles:
        handle.remove()
    progress = []
    hessians, weights = hf.collect_hessians(model, inputs, NAMES, batch_windows=2, progress=lambda *state: progress.append(state)), hf.layer_weights(model, NAMES)
    assert progress == [(3, 4), (4, 4)]  # layers: q, k and v, then down
    for name in NAMES:
        x = seen[name]
        assert np.array_equal(weights[name], model.get_submodule(name).weight.detach().numpy())
        # batches of other sizes change the inputs' last bits, panels are summed in float32: 256 units of 2^-24 each way are ample
        assert np.abs(hessians[name].matrix - x.T @ x / len(x)).max() <= 512 * 2.0**-24 * np.abs(x).max() ** 2, name
    recipe = mg.Recipe("mxfp4", rotation=32, scales="gptq", order="group", rounds=1)
    other = {name: h.matrix + np.diag(h.matrix.diagonal()) for name, h in hessians.items()}
    (row,) = compare_layers(weights, hessians, other, [("mine", recipe)])
    matrices = {name: mg.quantize_layer(weights[name], hessians[name], recipe) for name in NAMES}
    assert row.relative_error == pytest.approx(np.mean([q.report.relative_error for q in matrices.values()]), rel=1e-12)
    errors = {name: (weights[name] - q.dequantize(unrotate=True)).astype(np.float64) for name, q in matrices.items()}
    held_out = np.mean([np.trace(e @ other[n] @ e.T) / np.trace(weights[n] @ other[n] @ weights[n].T) for n, e in errors.items()])
    assert row.held_out_error == pytest.approx(held_out, rel=1e-4) and row.held_out_error != row.relative_error  # rotating to and fro rounds float32 weights, whose errors are a tenth of them


def test_blocks_one_by_one_see_what_the_whole_model_shows(leaf_folder, calibration_text):
    """To the bit, the batches being the same: all layers by hooks on one forward pass of the decoder, against a model that is held whole and one of which a block at a time is in memory. 11 windows: the last batch has 3."""
    model = hf.load_model(leaf_folder)
    inputs = hf.token_windows(hf.load_tokenizer(leaf_folder), calibration_text, 11, 64)
    modules = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layers." in name]
    expected = {name: mg.Hessian(model.get_submodule(name).in_features) for name in modules}
    handles = [model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: expected[name].update(args[0].numpy())) for name in modules]
    with torch.no_grad():
        for batch in inputs.split(8):
            model.base_model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    streamed = hf.load_streamed(leaf_folder)
    source = hf.StreamedBlocks(leaf_folder, streamed, lambda name: None)
    for got in (hf.collect_hessians(model, inputs, modules), {name: h for group, h in hf.observe_hessians(streamed, inputs, modules, source=source) for name in group}):
        assert list(got) == modules and got[modules[0]] is got[modules[1]]
        assert all(h.tokens == 11 * 64 and h.matrix.tobytes() == expected[name].matrix.tobytes() for name, h in got.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_blocks_hessians_are_held_and_blocks_behind_the_last_asked_for_are_not_run(model_and_inputs):
    """They are called once, when their arguments are noted."""
    model, inputs = model_and_inputs
    calls = []
    handles = [block.register_forward_pre_hook(lambda *_, index=index: calls.append(index)) for index, block in enumerate(model.model.layers)]
    names = [f"model.layers.{i}.mlp.{leaf}_proj" for i in (0, 1) for leaf in ("gate", "up", "down")]
    alive = []
    for group, hessian in hf.observe_hessians(model, inputs, names):
        del hessian
        alive.append((group, sum(type(each) is mg.Hessian for each in gc.get_objects())))
    assert [group for group, _ in alive] == [tuple(names[:2]), (names[2],), tuple(names[3:5]), (names[5],)]
    assert [count - alive[-1][1] for _, count in alive] == [1, 0, 1, 0] and calls == [0, 1, 2, 3, 0, 0, 1]
    for handle in handles:
        handle.remove()
    with pytest.raises(ValueError, match="lm_head is not a linear layer inside model.layers.0"):
        hf.collect_hessians(model, inputs, ["lm_head"])
