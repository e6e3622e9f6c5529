"""The command line on leaf: what it prints where, its exit statuses, what it writes, and what each command says against an independent computation."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mrgptq as mg
from mrgptq import cli

TEXTS = Path(__file__).resolve().parent.parent / "examples" / "text"
CALIBRATION, TEST = str(TEXTS / "calibration.txt"), str(TEXTS / "test.txt")


@pytest.fixture
def run(capsys):
    """Run the command line here: (exit status, stdout, stderr)."""

    def call(*arguments):
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory, leaf_folder):
    """Leaf at NVFP4 W4A4 by MR-GPTQ, as a stranger makes it, in a process of its own: (folder, CompletedProcess)."""
    folder = tmp_path_factory.mktemp("cli")
    command = [sys.executable, "-m", "mrgptq.cli", "quantize", str(leaf_folder), "leaf-nvfp4", "--activations", "nvfp4", "--calibration", CALIBRATION, "--tokens", "4096", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert os.listdir(folder) == ["leaf-nvfp4"]
    return folder / "leaf-nvfp4", done


def test_the_installed_command_is_main():
    (script,) = entry_points(group="console_scripts", name="mrgptq")
    assert script.load() is cli.main


def test_quantize_writes_a_checkpoint_and_says_what_loads_it(finished, leaf_folder):
    folder, done = finished
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "generation_config.json", "model.safetensors", "mrgptq.json", "tokenizer.json", "tokenizer_config.json", "training.json"}
    assert (folder / "tokenizer.json").read_bytes() == (leaf_folder / "tokenizer.json").read_bytes()
    loaded = mg.load(folder)
    matrices = [value for value in loaded.values() if isinstance(value, mg.QuantizedMatrix)]
    assert len(matrices) == 28 and all(matrix.rotation == mg.Hadamard(16) and matrix.activations.tensor_scale > 0 for matrix in matrices)
    errors = [layer["relative_error"] for layer in json.loads((folder / "mrgptq.json").read_text())["layers"].values()]
    lines = done.stdout.splitlines()
    assert lines[0] == "leaf-nvfp4: 28 layers, NVFP4 W4A4, Hadamard 16, gptq with fpquant_mse scales"
    assert lines[1] == f"mean relative layer error {sum(errors) / 28:.3e}, largest {max(errors):.3e}; 0 fallbacks" and 0 < max(errors) < 0.02
    assert len(lines) == 3 and all(word in lines[2] for word in ("vLLM applies the rotation", "transformers ignores it", "apply_transform_config", "mrgptq evaluate", "--rotation 0"))


def test_progress_goes_to_stderr(finished):
    _, done = finished
    assert "quantise: 100%" in done.stderr and "28/28" in done.stderr and "expected memory" in done.stderr
    assert "%" not in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "layers", "said"),
    [
        (["--recipe", "rtn"], 28, ["28, 786,432 weights", "NVFP4 W4A16\n", "calibration         none", "1.837 MB -> 706.8 kB", "solver", "rtn"]),
        (["--recipe", "rtn", "--format", "mxfp4", "--rotation", "64"], 28, ["MXFP4 W4A16, Hadamard 64", "even", "-> 682.2 kB"]),
        (["--recipe", "rtn", "--format", "mxfp4", "--activations", "mxfp4", "--dialect", "fp_quant"], 28, ["MXFP4 W4A4", "four-thirds", "fp_quant"]),
        (["--calibration", CALIBRATION, "--rotation", "0", "--tokens", "1e4", "--sequence", "100"], 28, ["NVFP4 W4A16\n", "10000 tokens in windows of 100", "gptq", "damping", "0.01"]),
        (["--recipe", "rtn", "--targets", r"layers\.[02].*down"], 2, ["2, 98,304 weights", "model.layers.2.mlp.down_proj"]),
        (["--recipe", "rtn", "--ignore", "lm_head|mlp"], 16, ["16, 196,608 weights"]),
    ],
)
def test_a_dry_run_prints_the_plan_and_writes_nothing(options, layers, said, run, leaf_folder, tmp_path):
    """Sizes: 917 504 weights and 9 * 128 of norms in bfloat16 make 1.837 MB; what is quantised takes 4.5 or 4.25 bits."""
    status, out, _ = run("quantize", leaf_folder, tmp_path / "out", "--dry-run", *options)
    assert status == 0 and list(tmp_path.iterdir()) == []
    assert all(word in out for word in (*said, "expected memory", str(tmp_path / "out"), "layers to quantise")), out
    assert len(re.findall(r"^model\.layers\.\d\.\S+ +\d+ +\d+ +[\d.]+ kB$", out, re.MULTILINE)) == layers


@pytest.mark.parametrize("dialect", ["compressed-tensors", "fp_quant"])
def test_the_options_reach_the_files(dialect, run, leaf_folder, tmp_path):
    options = ["--format", "mxfp4", "--activations", "mxfp4", "--recipe", "gptq", "--rotation", 64, "--targets", r"layers\.[01]\.", "--ignore", "up_proj", "--max-shard-bytes", 100_000]
    status, out, err = run("quantize", leaf_folder, tmp_path / "out", *options, "--dialect", dialect, "--calibration", CALIBRATION, "--tokens", 512, "--sequence", 64)
    assert status == 0, err
    rule = "four-thirds" if dialect == "fp_quant" else "even"
    assert "12 layers, MXFP4 W4A4, Hadamard 64" in out and f"absmax scales by the MX rule {rule}" in out
    matrices = {name: value for name, value in mg.load(tmp_path / "out").items() if isinstance(value, mg.QuantizedMatrix)}
    assert len(matrices) == 12 and not any("up_proj" in name or "layers.2" in name for name in matrices)
    assert {(m.format, m.rotation, m.activations) for m in matrices.values()} == {("mxfp4", mg.Hadamard(64), mg.Activations("mxfp4", rule))}
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == dialect
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 5
    assert {layer["tokens"] for layer in json.loads((tmp_path / "out/mrgptq.json").read_text())["layers"].values()} == {512}


def test_a_short_text_is_used_and_said(run, leaf_folder, tmp_path, caplog):
    (tmp_path / "short.txt").write_text(Path(CALIBRATION).read_text(encoding="utf-8")[:2000])
    status, _, _ = run("quantize", leaf_folder, tmp_path / "out", "--targets", "layers.0.mlp", "--calibration", tmp_path / "short.txt", "--tokens", 65536, "--sequence", 64)
    used = {layer["tokens"] for layer in json.loads((tmp_path / "out/mrgptq.json").read_text())["layers"].values()}
    assert status == 0 and len(used) == 1 and f"has only {used.pop()} of the 65536 tokens asked for" in caplog.text


def damaged(leaf_folder, tmp_path, name, change):
    """A copy of leaf with one file changed."""
    shutil.copytree(leaf_folder, tmp_path / "model")
    change(tmp_path / "model" / name)
    return tmp_path / "model"


def text_file(tmp_path, content):
    (tmp_path / "text.txt").write_bytes(content)
    return tmp_path / "text.txt"


REFUSED = {
    "no calibration": (lambda leaf, tmp: [leaf, tmp / "out"], ["needs a calibration text", "solver"]),
    "gptq without": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "gptq", "--format", "mxfp4"], ["needs a calibration text"]),
    "W4A4 NVFP4 without": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--activations", "nvfp4"], ["needs a calibration text", "W4A4 NVFP4"]),
    "out exists": (lambda leaf, tmp: [leaf, tmp, "--recipe", "rtn"], ["exists already", "never overwritten"]),
    "out's parent": (lambda leaf, tmp: [leaf, tmp / "a" / "out", "--recipe", "rtn"], ["the folder", "does not exist"]),
    "no model": (lambda leaf, tmp: [tmp / "nowhere", tmp / "out", "--recipe", "rtn"], ["no checkpoint at", "nowhere"]),
    "truncated": (lambda leaf, tmp: [damaged(leaf, tmp, "model.safetensors", lambda f: os.truncate(f, 10**6)), tmp / "out", "--recipe", "rtn"], ["model.safetensors", "truncated"]),
    "no weights": (lambda leaf, tmp: [damaged(leaf, tmp, "model.safetensors", os.remove), tmp / "out", "--recipe", "rtn"], ["no safetensors file"]),
    "no tokenizer": (lambda leaf, tmp: [damaged(leaf, tmp, "tokenizer.json", os.remove), tmp / "out", "--calibration", CALIBRATION], ["no tokenizer"]),
    "no text": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", tmp / "none.txt"], ["No such file", "none.txt"]),
    "not UTF-8": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", text_file(tmp, b"caf\xe9 au lait")], ["text.txt is not UTF-8 text"]),
    "no folder for it": (lambda leaf, tmp: [leaf, tmp / "a" / "out", "--recipe", "rtn", "--dry-run"], ["a/out cannot be made", "does not exist"]),
    "no such text": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", tmp / "none.txt"], ["the text", "none.txt cannot be read"]),
    "short text": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", text_file(tmp, b"once"), "--tokens", 512], ["the text has", "one window needs 512"]),
    "other format": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--activations", "mxfp4"], ["activations for nvfp4", "'mxfp4'"]),
    "rotation 12": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--rotation", 12], ["block_size is 12", "power of two"]),
    "rotation 512": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--rotation", 512], ["384 columns", "512"]),
    "fp_quant W4A16": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--dialect", "fp_quant"], ["fp_quant", "W4A4", "W4A16"]),
    "bad pattern": (lambda leaf, tmp: [leaf, tmp / "out", "--recipe", "rtn", "--ignore", "("], ["ignore", "'('", "regular expression"]),
    "lm_head": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", CALIBRATION, "--targets", "embed", "--tokens", 512], ["model.embed_tokens is not a linear layer inside model.layers.0"]),
    "device": (lambda leaf, tmp: [leaf, tmp / "out", "--calibration", CALIBRATION, "--device", "cuda:7"], ["device is 'cuda:7'", "torch cannot use"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_is_status_1_and_one_sentence_on_stderr_and_nothing_is_left(case, run, leaf_folder, tmp_path):
    build, words = REFUSED[case]
    arguments = build(leaf_folder, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run("quantize", *arguments)
    assert status == 1 and out == ""
    last = err.splitlines()[-1]
    assert last.startswith("mrgptq: ") and all(word in last for word in words), err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupt_leaves_nothing(run, leaf_folder, tmp_path, monkeypatch):
    def stop(self, stage, done, total):
        if done == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli._Progress, "__call__", stop)
    status, out, err = run("quantize", leaf_folder, tmp_path / "out", "--recipe", "rtn")
    assert (status, out) == (130, "") and "interrupted; nothing was written" in err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["quantize"], ["quantize", "a"], ["quantize", "a", "b", "--format", "int4"], ["quantize", "a", "b", "--recipe", "best"], ["quantize", "a", "b", "--tokens", "0"], ["quantize", "a", "b", "--tokens", "1e400"], ["quantize", "a", "b", "--tokens", "1.5"], ["quantize", "a", "b", "--dialect", "gguf"], ["quantize", "a", "b", "--unknown"], ["evaluate", "a"], ["inspect"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: mrgptq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["quantize", "evaluate", "inspect", "Hugging Face layout", "Exit status: 0 done, 1 refused", "2 wrong usage", "on a CPU"]),
        (["quantize", "--help"], ["rtn", "gptq", "mr-gptq", "ignores the rotation", "--rotation 0", "--dry-run", "examples", "mxfp4", "must not exist", "compressed-tensors", "fp_quant", "default: lm_head", "65536", "UTF-8"]),
        (["evaluate", "--help"], ["--reference", "rotations applied", "W4A4 inputs rounded", "other than the calibration"]),
        (["inspect", "--help"], ["histogram of scales", "fallbacks"]),
        (["--version"], [f"mrgptq {mg.__version__}"]),
    ],
)
def test_help_teaches(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and all(word in text for word in words), text


def test_evaluate_prints_both_perplexities(finished, run, leaf_folder):
    folder, _ = finished
    status, out, err = run("evaluate", folder, "--text", TEST, "--reference", leaf_folder, "--windows", 6, "--sequence", 128)
    assert status == 0 and "evaluate" in err
    header, original, quantised, last = (line.split() for line in out.splitlines())
    assert header == ["model", "perplexity"] and (original[0], quantised[0]) == (str(leaf_folder), str(folder)) and last == "768 tokens in 6 windows of 128".split()
    ids = torch.tensor(AutoTokenizer.from_pretrained(leaf_folder)(Path(TEST).read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(leaf_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        losses = [model(input_ids=window, labels=window).loss.item() for window in (ids[None, 128 * i : 128 * i + 129] for i in range(6))]
    expected = math.exp(sum(losses) / 6)
    assert float(original[1]) == pytest.approx(expected, abs=6e-5 + 1e-5 * expected)  # four decimals; float32 logits of another batch size
    assert 1.02 * expected < float(quantised[1]) < 2 * expected
    assert run("evaluate", folder, "--text", TEST, "--windows", 6, "--sequence", 128)[1].splitlines()[1].split()[1] == quantised[1]


def histogram(folder, dtype):
    """{line of the table} from the file itself, by the safetensors library and ml_dtypes."""
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        scales = np.concatenate([file.get_tensor(name).view(torch.uint8).numpy().ravel() for name in file.keys() if name.endswith("weight_scale")])
    powers, counts = np.unique(np.floor(np.log2(scales.view(dtype).astype(np.float64))), return_counts=True)
    return {f"2^{power:.0f}": (int(count), f"{100 * count / scales.size:.1f}") for power, count in zip(powers, counts, strict=True)}


@pytest.mark.parametrize("recorded", [True, False])
def test_inspect_shows_errors_bits_and_the_histogram_of_scales(recorded, finished, run, leaf_folder, tmp_path):
    if recorded:
        folder, dtype = finished[0], ml_dtypes.float8_e4m3fn
        status, out, _ = run("inspect", folder)
        layers = json.loads((folder / "mrgptq.json").read_text())["layers"]
        table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("model.layers")}
        assert table == {name: ["gptq", str(r["rows"]), str(r["cols"]), f"{r['relative_error']:.4g}", f"{r['weight_error']:.4g}", "0.01", "0", "–"] for name, r in layers.items()}
        bits = 8 * (786432 * (1 / 2 + 1 / 16) + 28 * 4) / 786432
        assert "NVFP4 W4A4, Hadamard 16, 28 layers" in out and "fallback" in out and "Recipe for nvfp4, W4A4" in out
    else:
        assert run("quantize", leaf_folder, tmp_path / "out", "--recipe", "rtn", "--format", "mxfp4")[0] == 0
        folder, dtype, bits = tmp_path / "out", ml_dtypes.float8_e8m0fnu, 4.25
        (folder / "mrgptq.json").unlink()
        status, out, _ = run("inspect", folder)
        assert "MXFP4 W4A16, 28 layers" in out and "no mrgptq.json: written by another tool, its errors are not known" in out
    assert status == 0 and f"{bits:.3f} bits each" in out and "786,432 weights" in out
    shown = {row[0]: (int(row[1]), row[2]) for line in out.splitlines() if (row := line.split()) and row[0].startswith("2^") and int(row[1])}
    assert shown == histogram(folder, dtype) and len(shown) > 3


@pytest.mark.parametrize(("command", "words"), [("inspect", "holds no quantised layer"), ("evaluate", "needs 513")])
def test_evaluate_and_inspect_refuse_likewise(command, words, run, leaf_folder, tmp_path):
    more = ["--text", text_file(tmp_path, b"once")] if command == "evaluate" else []
    status, out, err = run(command, leaf_folder, *more)
    assert (status, out) == (1, "") and words in err.splitlines()[-1]
    status, out, err = run(command, tmp_path / "nowhere", *more)
    assert (status, out) == (1, "") and "nowhere" in err.splitlines()[-1]
