"""Runs that are cut short and whose inputs are not the same when they go on, or while they are at work: refused, and the difference named."""

import json
import os
import re
import shutil
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import safetensors.numpy

from folders import contents
from interrupted import stop_at

import mrgptq as mg
from mrgptq.checkpoint.partial_run import first_difference
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": mg.Recipe.named("rtn", "mxfp4")}, r'recipe\.format "nvfp4"; this one has "mxfp4"'),
        ({"recipe": replace(mg.Recipe.named("rtn"), rotation=16)}, r"recipe\.rotation null; this one has 16"),
        ({"dialect": "mrgptq"}, r'dialect "compressed-tensors"; this one has "mrgptq"'),
        ({"ignore": "lm_head|k_proj"}, r"layer\.model\.layers\.0\.self_attn\.k_proj \[64, 128\]; this one has null"),
        ({"max_shard_bytes": 10**6}, "max_shard_bytes 5000000000; this one has 1000000"),
    ],
)
def test_another_run_does_not_go_on_from_what_is_left(change, words, leaf_folder, tmp_path):
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn"))
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan, progress=stop_at(9))
    before = contents(tmp_path / ".out.partial")
    with pytest.raises(ValueError, match=r"\.out\.partial was begun by a run with " + words + r"\. Give the same command to go on, or remove that folder"):
        quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", **({"recipe": mg.Recipe.named("rtn")} | change)))
    assert contents(tmp_path / ".out.partial") == before and not (tmp_path / "out").exists()


def test_changed_weights_another_text_version_and_number_of_threads_are_told(leaf_folder, calibration_text, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(leaf_folder, model)
    plan = make_plan(model, tmp_path / "out", mg.Recipe.named("gptq"), tokens=256, sequence=64)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan, calibration_text, threads=1, progress=stop_at(3))
    with pytest.raises(ValueError, match="SHA-256 of the calibration text"):
        quantize_checkpoint(plan, calibration_text + ".", threads=1)
    with pytest.raises(ValueError, match="begun by a run with threads 1; this one has 2"):
        quantize_checkpoint(plan, calibration_text, threads=2)
    with monkeypatch.context() as patch:
        patch.setattr("mrgptq.identity.version", lambda name: "9.9" if name == "torch" else version(name))
        with pytest.raises(ValueError, match=r'begun by a run with library version\.torch ".*"; this one has "9\.9"'):
            quantize_checkpoint(plan, calibration_text, threads=1)
    with open(model / "model.safetensors", "r+b") as file:  # one bit, nowhere near the header
        file.seek(-5, 2)
        bit = file.read(1)[0] ^ 1
        file.seek(-5, 2)
        file.write(bytes([bit]))
    with pytest.raises(ValueError, match=r'model file\.model\.safetensors "of \d+ bytes, changed at \d+ ns"; this one has "of'):
        quantize_checkpoint(plan, calibration_text, threads=1)


def test_settings_that_change_torchs_sums_are_told(leaf_folder, calibration_text, tmp_path, monkeypatch):
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("gptq"), tokens=256, sequence=64)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setenv("MKL_CBWR", "COMPATIBLE")
        quantize_checkpoint(plan, calibration_text, threads=1, progress=stop_at(3))
    with pytest.raises(ValueError, match=r'begun by a run with environment variable\.MKL_CBWR "COMPATIBLE"; this one has null'):
        quantize_checkpoint(plan, calibration_text, threads=1)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r'begun by a run with CPU capability of torch ".+"; this one has "OTHER"'):
        patch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "OTHER")
        quantize_checkpoint(plan, calibration_text, threads=1)
    quantize_checkpoint(plan, calibration_text, threads=1)


@pytest.mark.parametrize(
    ("meanwhile", "error", "words"),
    [
        (lambda model: None, KeyboardInterrupt(), r": the same command goes on from there$"),
        (lambda model: None, OSError(28, "full"), r": the same command goes on from there$"),
        (lambda model: None, ValueError("no such number"), r"; remove that folder to begin anew$"),
        (lambda model: (model / "tokenizer.json").write_text("{}"), KeyboardInterrupt(), r', but meanwhile model file\.tokenizer\.json has changed from "of .*" to "of .*": remove that folder to begin anew$'),
        (lambda model: os.remove(model / "model.safetensors"), OSError(28, "full"), r", but the run's inputs cannot be read any more \(.*model\.safetensors.*\): remove that folder to begin anew$"),
    ],
)
def test_what_is_kept_is_said_and_that_the_same_command_goes_on_only_where_it_does(meanwhile, error, words, leaf_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(leaf_folder, model)

    def progress(stage, done, total):
        if done == 9:
            meanwhile(model)
            raise error

    plan = make_plan(model, tmp_path / "out", mg.Recipe.named("rtn"))
    with pytest.raises(type(error)) as failure:
        quantize_checkpoint(plan, progress=progress)
    (note,) = failure.value.__notes__
    assert re.search(rf"^what is done is kept in .*\.out\.partial{words}", note), note


def test_a_side_file_that_vanishes_is_missed(leaf_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(leaf_folder, model)

    def progress(stage, done, total):
        if done == 5:
            (model / "tokenizer.json").unlink()

    with pytest.raises(ValueError, match=r"model file\.tokenizer\.json has changed from .* to null while the run was at work"):
        quantize_checkpoint(make_plan(model, tmp_path / "out", mg.Recipe.named("rtn")), progress=progress)
    assert not (tmp_path / "out").exists()


def test_hessians_given_to_other_layers_are_told(leaf_folder, stored_hessians, tmp_path):
    """The same files under another index."""
    shutil.copytree(stored_hessians, tmp_path / "h")
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("gptq"), hessians=tmp_path / "h")
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan, progress=stop_at(3))
    index = tmp_path / "h" / "hessians.json"
    files = json.loads(index.read_text())["hessians"]
    up, gate = (f"model.layers.{i}.mlp.up_proj" for i in (2, 3))
    index.write_text(json.dumps({"hessians": files | {up: files[gate], gate: files[up]}}))
    with pytest.raises(ValueError, match=r"begun by a run with Hessian file\.hessians\.json"):
        quantize_checkpoint(plan)


def test_a_tokenizer_behind_a_link_is_an_input_too(leaf_folder, calibration_text, tmp_path):
    """transformers follows it, though it is not copied into the result."""
    model, elsewhere = tmp_path / "model", tmp_path / "tokenizer.json"
    shutil.copytree(leaf_folder, model)
    shutil.move(model / "tokenizer.json", elsewhere)
    (model / "tokenizer.json").symlink_to(elsewhere)
    plan = make_plan(model, tmp_path / "out", mg.Recipe.named("gptq"), tokens=256, sequence=64)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(plan, calibration_text, threads=1, progress=stop_at(3))
    elsewhere.write_bytes(elsewhere.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"begun by a run with model file\.tokenizer\.json"):
        quantize_checkpoint(plan, calibration_text, threads=1)


def test_inputs_that_vanish_are_named_and_nothing_looks_like_a_result(leaf_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(leaf_folder, model)
    plan = make_plan(model, tmp_path / "out", mg.Recipe.named("rtn"))

    def progress(stage, done, total):
        if done == 5:
            (model / "model.safetensors").unlink()

    with pytest.raises(FileNotFoundError, match="model"):
        quantize_checkpoint(plan, progress=progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "model"]


def test_first_difference():
    assert first_difference({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 2]}}) is None
    assert first_difference({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 3]}}) == ("b.c", "[1, 2]", "[1, 3]")
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", "null", "2")
    assert first_difference({"a": 1, "c": 1, "b": 1}, {"b": 2, "a": 2}) == ("b", "1", "2") and first_difference({"a": 1, "c": 1}, {"a": 1}) == ("c", "1", "null")  # in the order of the second


def test_a_model_that_is_replaced_while_a_run_is_at_work_is_told(leaf_folder, tmp_path):
    """Its layers would be of the one and of the other; the run need not fail at anything for that."""
    model = tmp_path / "model"
    shutil.copytree(leaf_folder, model)

    def progress(stage, done, total):
        if done == 9:
            other = {name: np.asarray(value, dtype=np.float32) * 2 for name, value in mg.load(leaf_folder).items()}
            safetensors.numpy.save_file(other, tmp_path / "other.safetensors")
            os.replace(tmp_path / "other.safetensors", model / "model.safetensors")

    plan = make_plan(model, tmp_path / "out", mg.Recipe.named("rtn"))
    with pytest.raises(ValueError, match=r"model file\.model\.safetensors has changed from .* while the run was at work; its layers may be of either") as failure:
        quantize_checkpoint(plan, progress=progress)
    assert not (tmp_path / "out").exists() and "remove that folder to begin anew" in failure.value.__notes__[0]
