"""Calibration with one block in memory at a time: the bytes of a model that is held whole, whatever is read from disk when."""

from dataclasses import replace

import pytest
import torch

from folders import contents

import mrgptq as mg
from mrgptq import hf, plan
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan

BEST = mg.Recipe.named("best")
RECIPES = {
    "best": BEST,
    "mr-gptq W4A4": mg.Recipe.named("mr-gptq", activations="nvfp4"),
    "best-online W4A4": replace(mg.Recipe.named("best-online", "mxfp4", activations="mxfp4"), activation_rule="absmax", rotation=None),
}


@pytest.fixture
def run(leaf_folder, calibration_text, tmp_path, monkeypatch):
    """Quantises leaf, held whole or block by block: what is written."""

    def quantise(name, recipe, resident_bytes, progress=None, batch_windows=8):
        monkeypatch.setattr(plan, "RESIDENT_BYTES", resident_bytes)
        monkeypatch.setattr("mrgptq.jobs.BATCH_WINDOWS", batch_windows)
        made = make_plan(leaf_folder, tmp_path / name, recipe, tokens=1280, sequence=128)
        assert made.streamed == (resident_bytes == 0)
        quantize_checkpoint(made, calibration_text, threads=2, progress=progress)
        return contents(tmp_path / name)

    return quantise


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_the_bytes_are_those_of_a_model_that_is_held_whole(recipe, run):
    assert run("streamed", recipe, 0) == run("whole", recipe, 1 << 40)


def test_several_backward_passes_and_windows_in_turns_give_the_same_bytes(run, monkeypatch):
    """A pass for each block, each from what has been quantised so far; and as few windows at once as there can be. Batches of one window, since a pass that starts in the middle takes the batches as they stand, and sums in
    batches of other sizes may differ in their last bits."""
    monkeypatch.setattr("mrgptq.gptq.OUTPUT_HESSIAN_BYTES", 1)
    whole = run("whole", BEST, 1 << 40, batch_windows=1)
    assert run("streamed", BEST, 0, batch_windows=1) == whole
    monkeypatch.setattr("mrgptq.hf.fisher.HELD_BYTES", 1)
    calls = []
    assert run("in turns", BEST, 0, progress=lambda *state: calls.append(state), batch_windows=1) == whole
    assert [call for call in calls if call[0] == "gradients"][:10] == [("gradients", i + 1, 10) for i in range(10)]


@pytest.mark.parametrize("recipe", ["best", "mr-gptq W4A4"])
def test_a_streamed_run_that_was_cut_short_goes_on_to_the_same_bytes(recipe, run, monkeypatch):
    """In the middle of a block its observations are of the original's layers, of those too that are quantised already. In the second backward pass what the first gave is still kept, and not taken for its own."""
    monkeypatch.setattr("mrgptq.gptq.OUTPUT_HESSIAN_BYTES", 3_000_000)  # two passes
    expected = run("whole", RECIPES[recipe], 0)
    quantised = []

    def stop_at(moment):
        def progress(stage, done, total):
            if stage == "quantise":
                quantised.append(done)
            if (stage, done) == ("quantise", moment) or stage == moment and quantised:
                raise KeyboardInterrupt

        return progress

    for moment in (3, 9, 20) + ("gradients",) * (recipe == "best"):
        quantised.clear()
        with pytest.raises(KeyboardInterrupt):
            run(f"out {moment}", RECIPES[recipe], 0, progress=stop_at(moment))
        assert run(f"out {moment}", RECIPES[recipe], 0) == expected


def test_no_more_than_one_block_is_in_memory(leaf_folder, calibration_text, monkeypatch, tmp_path):
    """Whenever a layer or a window is done, and when all is."""
    models, counts = [], []
    load = hf.load_streamed
    monkeypatch.setattr(hf, "load_streamed", lambda *args, **kwargs: models.append(load(*args, **kwargs)) or models[-1])
    monkeypatch.setattr(plan, "RESIDENT_BYTES", 0)

    def held():
        return [any(not parameter.is_meta for parameter in block.parameters()) for block in models[0].model.layers]

    made = make_plan(leaf_folder, tmp_path / "out", BEST, tokens=512, sequence=128)
    quantize_checkpoint(made, calibration_text, threads=2, progress=lambda *state: counts.append((state[0], sum(held()))))
    assert {stage for stage, _ in counts} == {"gradients", "quantise"} and {count for stage, count in counts if stage == "quantise"} == {1} and {count for stage, count in counts if stage == "gradients"} == {0}
    assert not any(held()) and not any(parameter.is_meta for name, parameter in models[0].named_parameters() if ".layers." not in name)


def test_a_streamed_model_is_the_model(leaf_folder):
    """Each block with its numbers for as long as it is used, everything else from the beginning, logits and all."""
    model, streamed = hf.load_model(leaf_folder), hf.load_streamed(leaf_folder)
    inputs = torch.arange(24).reshape(2, 12)
    source = hf.StreamedBlocks(leaf_folder, streamed, lambda name: None)
    for index, block in enumerate(model.model.layers):
        with source.at(index) as mine:
            assert all(torch.equal(a, b) for a, b in zip(mine.state_dict().values(), block.state_dict().values(), strict=True))
        assert all(parameter.is_meta for parameter in mine.parameters())
    whole = hf.load_streamed(leaf_folder)
    whole.model.layers.load_state_dict(model.model.layers.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(whole(input_ids=inputs).logits, model(input_ids=inputs).logits)


def test_a_checkpoint_of_other_names_is_held_whole_and_that_is_said(leaf_folder, calibration_text, monkeypatch, tmp_path, caplog):
    """As those are whose experts transformers puts together."""
    monkeypatch.setattr(plan, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(hf, "load_streamed", lambda *args, **kwargs: None)
    recipe = mg.Recipe.named("mr-gptq")
    quantize_checkpoint(make_plan(leaf_folder, tmp_path / "streamed", recipe, tokens=512, sequence=128), calibration_text, threads=2)
    assert any("it is held in memory whole" in record.getMessage() for record in caplog.records)
    monkeypatch.setattr(plan, "RESIDENT_BYTES", 1 << 40)
    quantize_checkpoint(make_plan(leaf_folder, tmp_path / "whole", recipe, tokens=512, sequence=128), calibration_text, threads=2)
    assert contents(tmp_path / "streamed") == contents(tmp_path / "whole")


def test_names_that_differ_are_seen(leaf_folder, tmp_path):
    from mrgptq.checkpoint.safetensors import write_file

    for path in leaf_folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = {name.replace("mlp.up_proj", "mlp.w3"): value for name, value in mg.load(leaf_folder).items()}
    write_file(tmp_path / "model.safetensors", tensors)
    assert hf.load_streamed(tmp_path) is None and hf.load_streamed(leaf_folder) is not None


def test_a_large_model_is_expected_to_take_one_block(leaf_folder, tmp_path, monkeypatch):
    """Three of leaf's four blocks less, when it does not fit: 4 bytes each of their parameters, read from the file."""
    recipe = mg.Recipe.named("mr-gptq")
    sizes = {}
    for name, value in mg.load(leaf_folder).items():
        block = name.split(".layers.")[1].split(".")[0] if ".layers." in name else None
        sizes[block] = sizes.get(block, 0) + 4 * value.bits.size if hasattr(value, "bits") else sizes.get(block, 0) + 4 * value.size
    plans = {}
    for bound in (0, 1 << 40):
        monkeypatch.setattr(plan, "RESIDENT_BYTES", bound)
        plans[bound] = make_plan(leaf_folder, tmp_path / "out", recipe)
        assert ("one block of the model at a time" in repr(plans[bound])) == (bound == 0)
    assert plans[1 << 40].memory_bytes - plans[0].memory_bytes == 3 * sizes["0"]
