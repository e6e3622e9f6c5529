"""Hessians on disk: what comes back goes on where it stood, merges are those of memory, and what is no Hessian is refused by file."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from folders import contents

import mrgptq as mg
from mrgptq import cli
from mrgptq.checkpoint.hessians import write_groups
from mrgptq.display import format_bytes
from mrgptq.plan import make_plan


def hessian_of(tokens, cols=70, seed=0):
    h = mg.Hessian(cols)
    if tokens:
        h.update(np.random.default_rng(seed).standard_normal((tokens, cols)).astype(np.float32))
    return h


@pytest.mark.parametrize("tokens", [0, 1, 255, 256, 257, 1000])
@pytest.mark.parametrize("cols", [1, 31, 70, 290])
def test_what_comes_back_goes_on_byte_for_byte(tokens, cols, tmp_path):
    """The panel under way too, so later tokens fall into the panels they would have fallen into."""
    h = hessian_of(tokens, cols)
    mg.save_hessians(tmp_path / "h", {"a.b": h})
    back = mg.load_hessians(tmp_path / "h")["a.b"]
    assert (back.tokens, back.cols) == (tokens, cols) and back.matrix.tobytes() == h.matrix.tobytes()
    more = np.random.default_rng(5).standard_normal((400, cols)).astype(np.float32)
    for each in (h, back):
        each.update(more)
        each.merge(hessian_of(300, cols, seed=3))
        each.update(more[:100])
    assert back.tokens == h.tokens and back.matrix.tobytes() == h.matrix.tobytes()


def test_shared_hessians_are_stored_once_and_read_when_asked_for(tmp_path):
    shared, own = hessian_of(300), hessian_of(10, 33)
    mg.save_hessians(tmp_path / "h", {"x.q_proj": shared, "x.o_proj": own, "x.k_proj": shared})
    stored = mg.load_hessians(tmp_path / "h")
    assert list(stored) == ["x.q_proj", "x.k_proj", "x.o_proj"] and stored.groups == [("x.q_proj", "x.k_proj"), ("x.o_proj",)]
    assert len(list((tmp_path / "h").glob("*.safetensors"))) == 2 and "3 modules, 2 inputs" in repr(stored)
    tensors = safetensors.numpy.load_file(stored.file("x.o_proj"))  # in the words of another library
    assert tensors["tokens"].tolist() == [10] and tensors["panel"].shape == (10, 33) and not tensors["triangle"].any()
    (tmp_path / "h" / stored.file("x.o_proj").name).unlink()
    assert stored["x.q_proj"].tokens == 300
    with pytest.raises(FileNotFoundError):
        stored["x.o_proj"]
    with pytest.raises(FileNotFoundError, match=r"places 'x\.o_proj' in '00001\.safetensors', but .* has no such file"):
        mg.load_hessians(tmp_path / "h")


def test_merged_folders_are_merged_hessians(tmp_path):
    parts = [{"a": hessian_of(n, 40, seed=n), "b": hessian_of(n + 1, 50, seed=n + 1)} for n in (300, 77, 512)]
    for i, part in enumerate(parts):
        mg.save_hessians(tmp_path / f"h{i}", part)
    mg.merge_hessians(tmp_path / "all", [tmp_path / f"h{i}" for i in range(3)])
    for name in ("a", "b"):
        total = parts[0][name]
        for other in parts[1:]:
            total.merge(other[name])
        merged = mg.load_hessians(tmp_path / "all")[name]
        assert merged.tokens == total.tokens and merged.matrix.tobytes() == total.matrix.tobytes()
    mg.save_hessians(tmp_path / "other", {"a": hessian_of(5, 40), "c": hessian_of(5, 50)})
    with pytest.raises(ValueError, match=r"h0 and .*other are not of one model: b is in one alone"):
        mg.merge_hessians(tmp_path / "no", [tmp_path / "h0", tmp_path / "other"])
    mg.save_hessians(tmp_path / "wider", {"a": hessian_of(5, 40), "b": hessian_of(5, 60)})
    with pytest.raises(ValueError, match=r"b of .*wider.*60 columns; this Hessian has 50"):
        mg.merge_hessians(tmp_path / "no", [tmp_path / "h0", tmp_path / "wider"])
    with pytest.raises(ValueError, match="folders is empty"):
        mg.merge_hessians(tmp_path / "no", [])
    with pytest.raises(TypeError, match="folders is 'h0'; it must be a list"):
        mg.merge_hessians(tmp_path / "no", "h0")
    with pytest.raises(TypeError, match="has the key 1; keys are names"):
        mg.save_hessians(tmp_path / "no", {1: hessian_of(3)})
    assert not any("no" in path.name for path in tmp_path.iterdir())


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    mg.save_hessians(tmp_path / "h", {"a": hessian_of(5)})
    with pytest.raises(FileExistsError, match="h exists already"):
        mg.save_hessians(tmp_path / "h", {"a": hessian_of(5)})
    with pytest.raises(FileNotFoundError, match="the folder .*nowhere does not exist"):
        mg.save_hessians(tmp_path / "nowhere" / "h", {"a": hessian_of(5)})
    with pytest.raises(ValueError, match="no Hessian to write"):
        mg.save_hessians(tmp_path / "none", {})
    with pytest.raises(TypeError, match="a has a ndarray; only a Hessian knows"):
        mg.save_hessians(tmp_path / "none", {"a": np.eye(3)})
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="could not write .*No space left"):
        mg.save_hessians(tmp_path / "full", {"a": hessian_of(5), "b": hessian_of(5)})
    assert [path.name for path in tmp_path.iterdir()] == ["h"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "hessians.json").unlink(), "holds no Hessians: there is no hessians.json"),
        (lambda f: (f / "hessians.json").write_text("[]"), "must be a JSON object"),
        (lambda f: (f / "hessians.json").write_text('{"hessians": {}}'), "must be an object that maps modules to file names"),
        (lambda f: (f / "hessians.json").write_text('{"hessians": {"a": "../00000.safetensors"}}'), "must be the name of a safetensors file beside it"),
        (lambda f: (f / "hessians.json").write_text('{"hessians": {"' + 9999 * "a" + '": "' + 9999 * "b" + '.safetensors"}}'), r"places 'aaa.{,300}aaa' in 'bbb.{,300}', but .* has no such file"),
        (lambda f: behind_a_link(f / "hessians.json"), r"hessians\.json is a link to .*elsewhere, outside its folder; links that lead out of one are not followed"),
        (lambda f: behind_a_link(f / "00000.safetensors"), r"00000\.safetensors is a link to .*elsewhere, outside its folder"),
        (lambda f: os.truncate(f / "00000.safetensors", 300), "00000.safetensors"),
        (lambda f: rewrite(f, triangle=np.zeros(5, np.float32)), r"triangle is F32 of rank 1; a Hessian's is F64 of rank 1"),
        (lambda f: rewrite(f, triangle=np.zeros(5)), "triangle has 5 numbers; the lower triangle of 70 columns has 2485"),
        (lambda f: rewrite(f, panel=np.zeros((300, 70), np.float32)), "an open panel of 300 tokens does not fit"),
        (lambda f: rewrite(f, tokens=np.array([3])), "an open panel of 10 tokens does not fit 3 in all"),
        (lambda f: rewrite(f, panel=np.full((10, 70), np.nan, np.float32)), "panel holds what is not finite"),
        (lambda f: rewrite(f, triangle=np.full(70 * 71 // 2, np.inf)), "triangle holds what is not finite"),
        (lambda f: rewrite(f, tokens=np.array([1, 2])), "tokens has shape"),
        (lambda f: rewrite(f, panel=np.zeros((0, 0), np.float32)), "the lower triangle of 0 columns has 0"),
        (lambda f: rewrite(f, triangle=np.full(70 * 71 // 2, -1.0)), "triangle has a negative diagonal entry"),
    ],
)
def test_what_is_no_hessian_is_refused_by_file(spoil, words, tmp_path):
    mg.save_hessians(tmp_path / "h", {"a": hessian_of(10)})
    spoil(tmp_path / "h")
    with pytest.raises((ValueError, FileNotFoundError), match=words) as refusal:
        mg.load_hessians(tmp_path / "h")["a"]
    assert "h" in str(refusal.value)


def behind_a_link(path):
    path.symlink_to(path.rename(path.parent.parent / "elsewhere"))


def rewrite(folder, **changes):
    path = folder / "00000.safetensors"
    safetensors.numpy.save_file(safetensors.numpy.load_file(path) | changes, path)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, leaf_folder, calibration_text):
    """Leaf's Hessians by the command line: two texts, and both as one."""
    folder = tmp_path_factory.mktemp("calibrated")
    for i, piece in enumerate((calibration_text[:20_000], calibration_text[20_000:40_000])):
        (folder / f"{i}.txt").write_text(piece, encoding="utf-8")
        assert cli.main(["calibrate", str(leaf_folder), str(folder / f"h{i}"), "--calibration", str(folder / f"{i}.txt"), "--tokens", "2048", "--sequence", "128"]) == 0
    assert cli.main(["merge", str(folder / "h"), str(folder / "h0"), str(folder / "h1")]) == 0
    return folder


def test_calibrate_and_merge_on_the_command_line(calibrated, leaf_folder, leaf, calibration_text, capsys):
    from mrgptq import hf

    merged = mg.load_hessians(calibrated / "h")
    assert len(merged) == 28 and len(merged.groups) == 16 and merged["model.layers.0.mlp.up_proj"].tokens == 4096
    model, tokenizer = hf.load_model(leaf_folder), hf.load_tokenizer(leaf_folder)
    name = "model.layers.3.mlp.down_proj"
    total = mg.Hessian(384)
    for piece in (calibration_text[:20_000], calibration_text[20_000:40_000]):
        total.merge(hf.collect_hessians(model, hf.token_windows(tokenizer, piece, 16, 128), [name])[name])
    assert merged[name].matrix.tobytes() == total.matrix.tobytes()
    assert cli.main(["calibrate", str(leaf_folder), str(calibrated / "h"), "--calibration", str(calibrated / "0.txt")]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_checkpoint_from_stored_hessians_needs_neither_torch_nor_the_text(calibrated, leaf_folder, tmp_path):
    forbid = "import sys\nfor name in ('torch', 'transformers', 'safetensors', 'ml_dtypes', 'tqdm'): sys.modules[name] = None\nfrom mrgptq.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = ["quantize", str(leaf_folder), str(tmp_path / "out"), "--recipe", "best", "--cross", "0", "--output-hessian", "none", "--hessians", str(calibrated / "h"), "--threads", "2"]
    done = subprocess.run([sys.executable, "-c", forbid, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "mrgptq.json").read_text())["layers"]
    assert len(report) == 28 and {layer["tokens"] for layer in report.values()} == {4096} and {layer["method"] for layer in report.values()} == {"gptq"}
    assert "mean relative layer error" in done.stdout


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (mg.Recipe.named("best"), r"cross 0\.4, which needs both models at work; stored Hessians serve cross 0: .*--cross 0"),
        (replace(mg.Recipe.named("best"), cross=0.0), r"output_hessian 'fisher', which needs backward passes; .*--output-hessian none"),
        (mg.Recipe.named("gptq", activations="nvfp4"), "W4A4 NVFP4 stores a scale for each layer's inputs, which stored Hessians do not tell"),
    ],
)
def test_recipes_that_need_more_than_hessians_are_refused(recipe, words, calibrated, leaf_folder, tmp_path):
    with pytest.raises(ValueError, match=words):
        make_plan(leaf_folder, tmp_path / "out", recipe, hessians=calibrated / "h")


def test_a_layer_without_a_hessian_or_with_another_width_is_named(calibrated, leaf_folder, tmp_path):
    shutil.copytree(calibrated / "h", tmp_path / "h")
    index = json.loads((tmp_path / "h" / "hessians.json").read_text())["hessians"]
    down, up = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
    swapped = index | {down: index[up]}
    (tmp_path / "h" / "hessians.json").write_text(json.dumps({"hessians": swapped}))
    with pytest.raises(ValueError, match=rf"is of 128 columns; {down} has 384"):
        make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("gptq"), hessians=tmp_path / "h")
    del swapped[down]
    (tmp_path / "h" / "hessians.json").write_text(json.dumps({"hessians": swapped}))
    with pytest.raises(ValueError, match=rf"holds no Hessian of {down}"):
        make_plan(leaf_folder, tmp_path / "no", mg.Recipe.named("gptq"), hessians=tmp_path / "h")


def test_a_memory_limit_is_kept_before_anything_starts(leaf_folder, calibrated, tmp_path, capsys):
    command = ["quantize", str(leaf_folder), str(tmp_path / "out"), "--recipe", "mr-gptq", "--hessians", str(calibrated / "h")]
    plan = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("mr-gptq"), hessians=calibrated / "h")
    assert cli.main([*command, "--memory-limit", str(plan.memory_bytes - 1)]) == 1
    assert "the run is expected to take" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert cli.main([*command, "--workers", "2", "--memory-limit", str(plan.memory_bytes)]) == 1 and "with 2 workers" in capsys.readouterr().err
    assert cli.main([*command, "--memory-limit", f"{plan.memory_bytes / 1e9 + 1e-6:.6f}GB"]) == 0
    with pytest.raises(SystemExit):
        cli.main([*command, "--memory-limit", "lots"])
    assert "lots is not a size such as 16GB" in capsys.readouterr().err


def test_calibrate_holds_one_block_of_a_large_model(calibrated, leaf_folder, tmp_path, monkeypatch, capsys):
    """The bytes are those of a model that is held whole, and the memory is stated before: three of leaf's four blocks less, and Hessians of one."""
    from mrgptq import hf, plan

    whole = plan.plan_calibration(leaf_folder, tmp_path / "h", tokens=2048, sequence=128)
    monkeypatch.setattr(plan, "RESIDENT_BYTES", 0)
    streamed = plan.plan_calibration(leaf_folder, tmp_path / "h", tokens=2048, sequence=128)
    assert whole.memory_bytes - streamed.memory_bytes == 3 * 4 * (3 * 128 * 384 + 2 * 128**2 + 2 * 64 * 128 + 2 * 128)
    monkeypatch.setattr(hf, "load_model", None)
    command = ["calibrate", str(leaf_folder), str(tmp_path / "h"), "--calibration", str(calibrated / "0.txt"), "--tokens", "2048", "--sequence", "128", "--memory-limit"]
    assert cli.main([*command, str(streamed.memory_bytes - 1)]) == 1 and f"the limit is {format_bytes(streamed.memory_bytes - 1)}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*command, str(streamed.memory_bytes)]) == 0
    err = capsys.readouterr().err
    assert f"{format_bytes(streamed.memory_bytes)}, one block of the model at a time," in err and "28/28" in err
    assert contents(tmp_path / "h") == contents(calibrated / "h0")
    assert 0 < streamed.bytes_out - sum(path.stat().st_size for path in (tmp_path / "h").glob("*.safetensors")) < 16 * 1024 * 384  # panels under way, of which 2048 tokens leave none


def test_what_a_killed_process_left_goes_with_the_next_call_and_nothing_else(tmp_path):
    """A name with brackets, which are no pattern; a folder that is at work, another's, a file and a link stay."""
    program = (
        "import os, signal, sys, mrgptq as mg\nfrom mrgptq.checkpoint.hessians import write_groups\n"
        "def groups():\n    yield ('a',), mg.Hessian(8)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_groups(sys.argv[1], groups())"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "h[1]")]).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".h[1].hessians-") and [path.name for path in left.iterdir()] == ["00000.safetensors"]
    (tmp_path / ".h1.hessians-0").mkdir()
    (tmp_path / ".h[1].hessians-1").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".h[1].hessians-2").symlink_to(tmp_path / "elsewhere")
    others = {".h1.hessians-0", ".h[1].hessians-1", ".h[1].hessians-2", "elsewhere"}
    seen = []

    def groups():
        seen.append({path.name for path in tmp_path.iterdir()} - others)
        mg.save_hessians(tmp_path / "h[1]", {"a": hessian_of(5)})  # while the other is at work
        seen.append({path.name for path in tmp_path.iterdir()} - others)
        yield ("a",), hessian_of(7)

    with pytest.raises(FileExistsError, match="exists already"):
        write_groups(tmp_path / "h[1]", groups())
    assert left.name not in seen[0] and len(seen[0]) == 1 and seen[1] == seen[0] | {"h[1]"}
    assert {path.name for path in tmp_path.iterdir()} == others | {"h[1]"} and mg.load_hessians(tmp_path / "h[1]")["a"].tokens == 5


def test_layers_of_one_input_have_one_hessian(leaf_folder, stored_hessians, tmp_path):
    """Two files of the same bytes are one; another text's for k alone is refused by name."""
    stored = mg.load_hessians(stored_hessians)
    name = "model.layers.0.self_attn.k_proj"
    for folder, own in (("same", stored[name]), ("other", stored["model.layers.1.self_attn.k_proj"])):
        mg.save_hessians(tmp_path / folder, {module: stored[module] for module in stored if module != name} | {name: own})
    recipe = mg.Recipe.named("mr-gptq")
    assert make_plan(leaf_folder, tmp_path / "out", recipe, hessians=tmp_path / "same").hessians
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj and model\.layers\.0\.self_attn\.k_proj read one input, but .*other holds different Hessians"):
        make_plan(leaf_folder, tmp_path / "out", recipe, hessians=tmp_path / "other")
