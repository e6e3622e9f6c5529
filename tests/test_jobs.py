"""A whole-checkpoint run: the plan and what it promises, a run without torch, and what is left of one that fails (nothing)."""

import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch

from folders import contents

import mrgptq as mg
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan, needs_calibration, with_rotation

SHAPES = {"self_attn.q_proj": (32, 64), "self_attn.k_proj": (16, 64), "self_attn.v_proj": (16, 64), "self_attn.o_proj": (64, 32), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}
RTN = {format: mg.Recipe.named("rtn", format) for format in mg.FORMATS}


@pytest.fixture
def folder(tmp_path):
    """A model of two blocks in bfloat16, two shards with an index; its q, k and v have different largest magnitudes."""
    rng = np.random.default_rng(0)
    shards = {"model-00001-of-00002.safetensors": {"model.embed_tokens.weight": rng.standard_normal((48, 64))}, "model-00002-of-00002.safetensors": {"model.norm.weight": np.ones(64)}}
    for i, shard in enumerate(shards.values()):
        shard |= {f"model.layers.{i}.{leaf}.weight": rng.standard_normal(shape) * (1 + j) for j, (leaf, shape) in enumerate(SHAPES.items())}
    path = tmp_path / "model"
    path.mkdir()
    for name, shard in shards.items():
        safetensors.numpy.save_file({key: value.astype(ml_dtypes.bfloat16) for key, value in shard.items()}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {key: name for name, shard in shards.items() for key in shard}}))
    (path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    (path / "tokenizer.json").write_text("{}")
    return path


def listing(path):
    return sorted(p.name for p in path.iterdir())


def stored(path):
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in safetensors.torch.load_file(file).items()}


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 10_000])
@pytest.mark.parametrize(("dialect", "format", "activations", "rotation"), [("compressed-tensors", "nvfp4", None, None), ("compressed-tensors", "nvfp4", None, 16), ("compressed-tensors", "mxfp4", "mxfp4", 32), ("fp_quant", "mxfp4", "mxfp4", 32)])
def test_the_plan_says_what_is_written(dialect, format, activations, rotation, shard_bytes, folder, tmp_path):
    """bytes_out leaves out the small parts alone: 4 bytes of each NVFP4 (fp_quant: each) divisor and 2 k^2 of each stored rotation."""
    recipe = replace(mg.Recipe.named("rtn", format, dialect, activations), rotation=rotation)
    plan = make_plan(folder, tmp_path / "out", recipe, dialect=dialect, max_shard_bytes=shard_bytes)
    assert not plan.calibrated and plan.tokens == 0 and listing(tmp_path) == ["model"]
    assert plan.shapes == {f"model.layers.{i}.{leaf}": shape for i in range(2) for leaf, shape in SHAPES.items()}
    assert plan.bytes_in == sum(tensor.nbytes for tensor in stored(folder).values())
    calls = []
    reports = quantize_checkpoint(plan, progress=lambda *state: calls.append(state))
    assert calls == [("quantise", i + 1, 14) for i in range(14)]
    written = stored(tmp_path / "out")
    small = {"fp_quant": 4 + 4 + 2 * 2 * 32**2, "compressed-tensors": 4 * (format == "nvfp4") + (2 * rotation**2 if rotation else 0)}[dialect]
    assert sum(tensor.nbytes for tensor in written.values()) == plan.bytes_out + 14 * small
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shard_bytes == 10_000)
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert np.array_equal(written[name].float(), stored(folder)[name].float())
    assert {name: (report.rows, report.cols, report.method) for name, report in reports.items()} == {name: (*shape, "rounding") for name, shape in plan.shapes.items()}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == dialect and config == {"model_type": "llama", "hidden_size": 64} | ({"dtype": "bfloat16"} if dialect == "compressed-tensors" else {})
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("rotation", [None, 16])
def test_a_run_without_calibration_rounds_each_layer_under_the_scale_of_its_fused_set(rotation, folder, tmp_path):
    plan = make_plan(folder, tmp_path / "out", replace(RTN["nvfp4"], rotation=rotation))
    quantize_checkpoint(plan)
    weights, got = stored(folder), mg.load(tmp_path / "out")
    turn = mg.Hadamard(rotation) if rotation else mg.Identity()
    scales = {}
    for i in range(2):
        for leaves in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]):
            rotated = {leaf: turn.apply(weights[f"model.layers.{i}.{leaf}.weight"].float().numpy()) for leaf in leaves}
            scale = np.float32(2688 / max(float(np.abs(values).max()) for values in rotated.values()))
            for leaf, values in rotated.items():
                expected = mg.quantize(values, "nvfp4", tensor_scale=float(scale))
                matrix = got[f"model.layers.{i}.{leaf}.weight"]
                assert (matrix.codes.tobytes(), matrix.scales.tobytes(), matrix.tensor_scale) == (expected.codes.tobytes(), expected.scales.tobytes(), scale)
                scales[leaf] = scale
    assert len(set(scales.values())) == 4


@pytest.mark.parametrize("format", mg.FORMATS)
def test_rtn_needs_numpy_alone(format, folder, tmp_path):
    """In a process where torch, transformers, safetensors, ml_dtypes and tqdm cannot be imported; the same bytes as here."""
    forbid = "import sys\nfor name in ('torch', 'transformers', 'safetensors', 'ml_dtypes', 'tqdm', 'matplotlib'): sys.modules[name] = None\n"
    run = f"from mrgptq.cli import main\nstatus = main(sys.argv[1:])\nassert sys.modules['torch'] is None\nsys.exit(status)"
    command = ["quantize", str(folder), str(tmp_path / "there"), "--recipe", "rtn", "--format", format]
    done = subprocess.run([sys.executable, "-c", forbid + run, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "14 layers" in done.stdout and "quantise 14/14" in done.stderr  # plain lines in place of tqdm's bar
    quantize_checkpoint(make_plan(folder, tmp_path / "here", RTN[format]))
    assert (tmp_path / "there/model.safetensors").read_bytes() == (tmp_path / "here/model.safetensors").read_bytes()
    calibrated = subprocess.run([sys.executable, "-c", forbid + run, "quantize", str(folder), str(tmp_path / "no"), "--calibration", __file__], capture_output=True, text=True)
    assert calibrated.returncode == 1 and "torch and transformers, which are not installed" in calibrated.stderr and "mrgptq[hf]" in calibrated.stderr
    assert listing(tmp_path) == ["here", "model", "there"]


@pytest.mark.parametrize(("name", "format", "activations", "words"), [("gptq", "mxfp4", None, "solver"), ("mr-gptq", "nvfp4", None, "solver"), ("gptq", "nvfp4", "nvfp4", "solver"), ("rtn", "nvfp4", "nvfp4", "W4A4 NVFP4 stores a scale for each layer's inputs")])
def test_a_recipe_that_needs_a_text_is_refused_without(name, format, activations, words, folder, tmp_path):
    recipe = mg.Recipe.named(name, format, activations=activations)
    with pytest.raises(ValueError, match=f"needs a calibration text: .*{words}"):
        make_plan(folder, tmp_path / "out", recipe, calibrated=False)
    plan = make_plan(folder, tmp_path / "out", recipe, tokens=4096)
    assert plan.calibrated and plan.tokens == 4096
    with pytest.raises(ValueError, match="calibration is None"):
        quantize_checkpoint(plan)
    assert listing(tmp_path) == ["model"]


@pytest.mark.parametrize(("name", "format", "activations"), [("rtn", "nvfp4", None), ("rtn", "mxfp4", None), ("rtn", "mxfp4", "mxfp4")])
def test_a_recipe_that_needs_none_reads_none(name, format, activations, folder, tmp_path):
    recipe = mg.Recipe.named(name, format, activations=activations)
    assert needs_calibration(recipe) is None and not make_plan(folder, tmp_path / "out", recipe, calibrated=True).calibrated


def with_tensor(folder, name, array):
    safetensors.numpy.save_file({name: array}, folder / "model.safetensors")  # found before the index


@pytest.mark.parametrize(
    ("prepare", "options", "error", "words"),
    [
        (lambda f: (f.parent / "out").mkdir(), {}, FileExistsError, ("out exists already", "never overwritten")),
        (lambda f: (f.parent / "out").symlink_to("nowhere"), {}, FileExistsError, ("out exists already",)),
        (lambda f: shutil.rmtree(f), {}, FileNotFoundError, ("no checkpoint at", "model")),
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), {}, FileNotFoundError, ("model-00002-of-00002.safetensors", "no such file")),
        (lambda f: os.truncate(f / "model-00001-of-00002.safetensors", 9000), {}, ValueError, ("model-00001-of-00002.safetensors", "truncated")),
        (lambda f: (f / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}'), {}, ValueError, ("quantised already", "'awq'", "the original")),
        (lambda f: with_tensor(f, "a.0.w.weight", np.ones((4, 100), np.float32)), {}, ValueError, ("a.0.w.weight has 100 columns", "nvfp4 needs a multiple of 16")),
        (lambda f: with_tensor(f, "a.0.w.weight", np.ones((4, 100), np.float32)), {"recipe": replace(RTN["nvfp4"], pad=True)}, ValueError, ("a.0.w has 12 columns of zeros", "compressed-tensors cannot", '"mrgptq"')),
        (lambda f: None, {"recipe": replace(RTN["mxfp4"], scales="four-thirds")}, ValueError, ("four-thirds", "fp_quant")),
        (lambda f: None, {"dialect": "fp_quant"}, ValueError, ("W4A4", "W4A16")),
        (lambda f: None, {"dialect": "gguf"}, ValueError, ("'gguf'", "compressed-tensors, fp_quant")),
        (lambda f: None, {"targets": "("}, ValueError, ("targets", "'('", "regular expression")),
        (lambda f: None, {"ignore": "."}, ValueError, ("no module to quantise",)),
    ],
)
def test_a_plan_is_refused_at_the_door(prepare, options, error, words, folder, tmp_path):
    prepare(folder)
    before = listing(tmp_path)
    with pytest.raises(error) as refusal:
        make_plan(folder, tmp_path / "out", **({"recipe": RTN["nvfp4"]} | options))
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert listing(tmp_path) == before


@pytest.mark.parametrize("format", mg.FORMATS)
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_weight_that_cannot_be_quantised_is_named_and_nothing_is_left(dtype, format, folder, tmp_path):
    weight = np.ones((4, 64), dtype)
    if dtype == np.float32:
        weight[2, 5] = np.nan
    with_tensor(folder, "a.0.w.weight", weight)
    with pytest.raises((ValueError, TypeError)) as refusal:
        quantize_checkpoint(make_plan(folder, tmp_path / "out", RTN[format]))
    words = ("is nan at row 2, column 5", "finite") if dtype == np.float32 else ("dtype uint8", "float32")
    assert all(word in str(refusal.value) for word in ("a.0.w.weight", *words)), refusal.value
    assert listing(tmp_path) == ["model"]


def test_no_room_for_the_result_is_refused_at_once(folder, tmp_path, monkeypatch):
    """The layers as they are done, and then the checkpoint of them."""
    plan = make_plan(folder, tmp_path / "out", RTN["nvfp4"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, plan.bytes_out + plan.kept_bytes))  # that of the tensors alone
    started = []
    with pytest.raises(OSError, match=r"needs \d+ bytes while it is made, \d+ of them in the end") as refusal:
        quantize_checkpoint(plan, progress=lambda *state: started.append(state))
    assert refusal.value.errno == errno.ENOSPC and not started and listing(tmp_path) == ["model"]


@pytest.mark.parametrize(("dialect", "recipe", "shard_bytes"), [("compressed-tensors", replace(RTN["nvfp4"], rotation=32), 10_000), ("mrgptq", RTN["mxfp4"], 10**9)])
def test_the_room_that_is_asked_for_is_enough(dialect, recipe, shard_bytes, folder, tmp_path, monkeypatch):
    """For all that lies there just before the result gets its name, headers, records, side files and whole blocks."""
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": "a" * 300_000}))
    plan = make_plan(folder, tmp_path / "out", recipe, dialect=dialect, max_shard_bytes=shard_bytes)
    with monkeypatch.context() as patch, pytest.raises(OSError) as refusal:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
        quantize_checkpoint(plan)
    needed, in_the_end = (int(number) for number in re.findall(r" (\d+) (?:bytes|of them)", str(refusal.value)))
    rename, taken = os.rename, []

    def measured(old, new):
        if Path(new) == plan.out:
            taken.append([sum(max(path.stat().st_size, 512 * path.stat().st_blocks) for path in where.rglob("*")) for where in (tmp_path / ".out.partial", Path(old))])
        rename(old, new)

    monkeypatch.setattr(os, "rename", measured)
    quantize_checkpoint(plan)
    ((all_of_it, result),) = taken
    assert plan.bytes_out + 300_000 < result < in_the_end < needed and all_of_it < needed


@pytest.mark.parametrize("calls", range(0, 30, 2))
def test_a_disk_that_fills_up_midway_leaves_nothing_like_a_result_and_the_same_call_goes_on(calls, folder, tmp_path, monkeypatch):
    """fsync is where a filesystem that allocates late says so: for the manifest, each layer and its folder, the note of what is built, the shards, the index and each side file in turn. How many there are is counted first."""
    real, count = os.fsync, [0, 10**9]

    def fsync(descriptor):
        count[0] += 1
        if count[0] > count[1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    plan = make_plan(folder, tmp_path / "whole", RTN["nvfp4"], max_shard_bytes=20_000)
    quantize_checkpoint(plan)
    assert count[0] == 30
    count[:] = 0, min(calls, count[0] - 2)  # the last is the outer folder's, after the result has its name
    plan = make_plan(folder, tmp_path / "out", RTN["nvfp4"], max_shard_bytes=20_000)
    with pytest.raises(OSError, match="could not write .*No space left") as refusal:
        quantize_checkpoint(plan)
    assert refusal.value.errno == errno.ENOSPC and set(listing(tmp_path)) <= {".out.partial", "model", "whole"}
    count[1] = 10**9
    quantize_checkpoint(plan)
    assert listing(tmp_path) == ["model", "out", "whole"] and contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("at", [1, 9])
def test_a_run_that_is_cut_short_keeps_what_is_done(at, error, folder, tmp_path, caplog):
    quantize_checkpoint(make_plan(folder, tmp_path / "whole", RTN["mxfp4"], max_shard_bytes=10_000))

    def progress(stage, done, total):
        if done == at:
            assert listing(tmp_path) == [".out.partial", "model", "whole"]
            raise error("stop")

    plan = make_plan(folder, tmp_path / "out", RTN["mxfp4"], max_shard_bytes=10_000)
    with pytest.raises(error, match="stop"):
        quantize_checkpoint(plan, progress=progress)
    assert listing(tmp_path) == [".out.partial", "model", "whole"]
    calls = []
    quantize_checkpoint(plan, progress=lambda *state: calls.append(state))
    assert calls == [("quantise", i + 1, 14) for i in range(14)]
    done = {1: 1, 9: 10}[at]  # down alone is the first part; the ninth layer and the tenth are one
    assert any(f"{done} of 14 layers are done" in record.getMessage() for record in caplog.records), caplog.records
    assert listing(tmp_path) == ["model", "out", "whole"] and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_with_rotation():
    recipe = mg.Recipe.named("mr-gptq", "mxfp4")
    assert [with_rotation(recipe, k).rotation for k in (None, 0, 64)] == [32, None, 64]
    assert replace(with_rotation(recipe, 64), rotation=32) == recipe


def test_a_damping_that_had_to_rise_is_said(leaf_folder, calibration_text, tmp_path, monkeypatch, caplog):
    """An indefinite moment, as rounding could leave one, instead of the gradients' own."""

    def indefinite(model, inputs, modules, **_):
        moments = {}
        for name in modules:
            moment = np.eye(model.get_submodule(name).out_features)
            half = len(moment) // 2
            moment[:half, half:] = moment[half:, :half] = 1.3 * np.eye(half)  # eigenvalues -0.3
            moments[name] = mg.Hessian.from_state(moment[np.tril_indices(len(moment))], np.empty((0, len(moment)), np.float32), 1)
        return moments

    monkeypatch.setattr(importlib.import_module("mrgptq.hf.calibrate"), "collect_output_hessians", indefinite)  # by its path: the package gives the name to the function
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("best"), tokens=256, sequence=128, targets=r"layers\.1\.mlp\.up_proj")
    reports = quantize_checkpoint(plan, calibration_text)
    assert [report.output_damping for report in reports.values()] == [0.5]
    assert [record.getMessage() for record in caplog.records if record.name.startswith("mrgptq")] == ["model.layers.1.mlp.up_proj: the output Hessian's damping raised from 0.05 to 0.5"]


def test_output_hessians_are_in_the_expected_memory(leaf_folder, tmp_path):
    """Leaf's four blocks have 128 + 64 + 64 + 128 + 384 + 384 + 128 rows each, squared in float64 and all at hand at once; beside them copies of one and the logits of a window."""
    best = mg.Recipe.named("best")
    alike, weighed = (make_plan(leaf_folder, tmp_path / "out", recipe).memory_bytes for recipe in (replace(best, output_hessian=None), best))
    moments = 8 * 4 * (3 * 128**2 + 2 * 64**2 + 2 * 384**2)
    assert moments < weighed - alike < 3 * moments + 4 * 4 * 512 * 1024


def test_the_original_beside_the_quantised_model_is_in_the_expected_memory(leaf_folder, tmp_path):
    """``cross`` holds the original's hidden states, one of its blocks and a moment for each group of inputs: three of 128 columns and one of 384;
    what the stream has lost for o_proj and down_proj, and room for q_proj's, which has as many rows; and two working copies of the widest moment."""
    best = replace(mg.Recipe.named("best"), output_hessian=None)
    once, twice = (make_plan(leaf_folder, tmp_path / "out", replace(best, cross=cross), tokens=4096, sequence=256).memory_bytes for cross in (0.0, 0.25))
    assert twice - once == 4 * (4096 * 128 + 2 * 128 * 128 + 2 * 64 * 128 + 3 * 384 * 128) + 8 * (3 * 128**2 + 3 * 384**2) + 8 * 128 * (128 + 128 + 384)


def test_a_backward_pass_through_a_large_vocabulary_is_in_the_expected_memory(folder, tmp_path):
    """Seven copies of a window's logits, which are by far the largest thing here."""
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 1_000_000}))
    best = mg.Recipe.named("best")
    alike, weighed = (make_plan(folder, tmp_path / "out", recipe, sequence=256) for recipe in (replace(best, output_hessian=None), best))
    logits = 7 * 256 * 1_000_000 * 4
    assert 0.95 * logits < weighed.memory_bytes - alike.memory_bytes < 1.05 * logits
    assert "1 backward pass through the model" in repr(weighed) and "pass through" not in repr(alike)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size"])
def test_a_size_that_config_json_leaves_open_is_taken_from_the_layers(key, leaf_folder, tmp_path):
    """As null, like one that is missing."""
    for name, value in (("null", None), ("missing", ...)):
        shutil.copytree(leaf_folder, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        config = {other: each for other, each in config.items() if other != key} | ({} if value is ... else {key: value})
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    null, missing = (make_plan(tmp_path / name, tmp_path / "out", mg.Recipe.named("best"), tokens=256, sequence=64).memory_bytes for name in ("null", "missing"))
    assert null == missing > 0
