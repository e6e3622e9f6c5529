"""The command line on leaf: what it prints where, its exit statuses, what it writes, and what each command says against an independent computation."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mrgptq as mg
from mrgptq import cli

TEXTS = Path(__file__).resolve().parent.parent / "examples" / "text"
CALIBRATION, TEST = str(TEXTS / "calibration.txt"), str(TEXTS / "test.txt")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, leaf_folder):
    """Leaf at NVFP4 W4A4 by MR-GPTQ, as a stranger makes it, in a process of its own: (folder, CompletedProcess)."""
    return made(tmp_path_factory, lambda *command, cwd: subprocess.run([sys.executable, "-m", "mrgptq.cli", *command], capture_output=True, text=True, cwd=cwd), leaf_folder, "--recipe", "mr-gptq")


@pytest.fixture(scope="module")
def best(tmp_path_factory, leaf_folder, forks):
    """The same by the recipe that is taken where none is named."""
    return made(tmp_path_factory, lambda *command, cwd: forks.run("mrgptq", *command, cwd=cwd), leaf_folder)


def made(tmp_path_factory, run, leaf_folder, *options):
    folder = tmp_path_factory.mktemp("cli")
    done = run("quantize", str(leaf_folder), "leaf-nvfp4", *options, "--activations", "nvfp4", "--calibration", CALIBRATION, "--tokens", "4096", "--threads", "1", cwd=folder)
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


def layers_of(folder):
    return json.loads((folder / "mrgptq.json").read_text())["layers"]


def recipe_of(folder):
    return mg.Recipe.from_dict(json.loads((folder / "mrgptq.json").read_text())["recipe"])


def test_best_is_the_recipe_where_none_is_named(best, finished):
    folder, done = best
    assert recipe_of(folder) == mg.Recipe.named("best", "nvfp4", "compressed-tensors", "nvfp4")
    lines = done.stdout.splitlines()
    assert "gradients: 100%" in done.stderr and "quantise: 100%" in done.stderr
    assert lines[0] == "leaf-nvfp4: 28 layers, NVFP4 W4A4, gptq with gptq scales"
    layers = layers_of(folder).values()
    means = [np.mean([layer[field] for layer in layers]) for field in ("relative_error", "output_error")]
    assert lines[1] == f"mean relative layer error {means[0]:.3e}, {means[1]:.3e} as the predictions mind it, largest {max(layer['relative_error'] for layer in layers):.3e}; 0 fallbacks"
    assert lines[2:] == ["Loads in transformers (with compressed-tensors), vLLM and SGLang."]
    matrices = [value for value in mg.load(folder).values() if isinstance(value, mg.QuantizedMatrix)]
    assert len(matrices) == 28 and all(matrix.rotation == mg.Identity() and matrix.activations.rule == "absmax" for matrix in matrices)
    # What it is for: less error than the paper's method leaves, and in every layer than plain rounding would; still less by the outputs that it minds.
    ours, theirs = layers_of(folder), layers_of(finished[0])
    assert np.mean([layer["relative_error"] for layer in ours.values()]) < np.mean([layer["relative_error"] for layer in theirs.values()])
    assert all(layer["output_error"] < layer["relative_error"] < layer["rounded_error"] for layer in ours.values())
    assert all(layer["output_error"] is None and layer["relative_error"] < layer["rounded_error"] for layer in theirs.values())


def test_best_makes_up_for_the_layers_before_unless_told_not_to(run, leaf_folder, tmp_path):
    options = ["--targets", r"layers\.[01]\.", "--calibration", CALIBRATION, "--tokens", 1024, "--sequence", 128]
    kept = {}
    for name, more in (("best", []), ("plain", ["--cross", 0]), ("alike", ["--output-hessian", "none"])):
        status, out, err = run("quantize", leaf_folder, tmp_path / name, *options, *more)
        assert status == 0, err
        cross, outputs = 0.0 if name == "plain" else mg.Recipe.named("best").cross, None if name == "alike" else "fisher"
        assert recipe_of(tmp_path / name) == replace(mg.Recipe.named("best"), cross=cross, output_hessian=outputs)
        assert {layer["output_error"] is None for layer in layers_of(tmp_path / name).values()} == {outputs is None}
        assert {layer["cross"] for layer in layers_of(tmp_path / name).values()} == {cross} and len(layers_of(tmp_path / name)) == 14
        assert out.splitlines()[0] == f"{tmp_path / name}: 14 layers, NVFP4 W4A16, gptq with gptq scales"
        kept[name] = mg.load(tmp_path / name)
    assert mg.Recipe.named("best").cross > 0
    # Where inputs come from quantised layers the targets differ, and so do some codes of every one.
    later = [name for name in kept["best"] if ".layers.1." in name and isinstance(kept["best"][name], mg.QuantizedMatrix)]
    assert len(later) == 7 and all(not np.array_equal(kept["best"][name].codes, kept[other][name].codes) for name in later for other in ("plain", "alike"))


def test_best_online_is_for_our_own_runtime_and_its_dialect(run, leaf_folder, tmp_path):
    """Rotated inputs whose scales are searched: no other dialect can say that, so none is asked for."""
    options = ["--recipe", "best-online", "--format", "mxfp4", "--activations", "mxfp4", "--targets", r"layers\.[01]\.", "--calibration", CALIBRATION, "--tokens", 1024, "--sequence", 128]
    status, out, err = run("quantize", leaf_folder, tmp_path / "out", *options)
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == f"{tmp_path / 'out'}: 14 layers, MXFP4 W4A4, Hadamard 32, activations by mse, gptq with gptq scales by the MX rule even"
    assert lines[2].startswith("Runs in mrgptq alone (`mrgptq evaluate`, mrgptq.hf.load_quantized).") and 'none applies activation scales by "mse"' in lines[2]
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"] == "mrgptq"
    assert recipe_of(tmp_path / "out") == mg.Recipe.named("best-online", "mxfp4", "mrgptq", "mxfp4")
    matrices = [value for value in mg.load(tmp_path / "out").values() if isinstance(value, mg.QuantizedMatrix)]
    assert {(m.format, m.rotation, m.activations) for m in matrices} == {("mxfp4", mg.Hadamard(32), mg.Activations("mxfp4", "even", None, "mse"))} and len(matrices) == 14
    for layer in layers_of(tmp_path / "out").values():
        assert layer["relative_error"] < layer["rounded_error"] and len(layer["damped_errors"]) > 1 and sum(layer["scale_offsets"].values()) == layer["rows"] * layer["cols"] / 32
    status, out, _ = run("inspect", tmp_path / "out")
    assert status == 0 and "MXFP4 W4A4, Hadamard 32, activations by mse, 14 layers" in out and "mxfp4, mse, even" in out
    # The runtime that it is for runs it: near the original, and by the searched scales, without which the same bytes answer otherwise.
    perplexities = [evaluated(run, tmp_path / "out")]
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["quantization_config"]["activations"]["rule"] = "absmax"
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    perplexities.append(evaluated(run, tmp_path / "out"))
    original = evaluated(run, leaf_folder)
    assert 0.98 * original < perplexities[0] < 1.5 * original and perplexities[0] != perplexities[1]


def evaluated(run, folder):
    status, out, err = run("evaluate", folder, "--text", TEST, "--windows", 4, "--sequence", 128)
    assert status == 0, err
    return float(out.splitlines()[1].split()[1])


@pytest.mark.parametrize(
    ("options", "dialect"),
    [
        ([], "compressed-tensors"), (["--recipe", "best-online"], "compressed-tensors"), (["--recipe", "best-online", "--activations", "none"], "compressed-tensors"),
        (["--activations", "nvfp4"], "compressed-tensors"), (["--recipe", "mr-gptq", "--activations", "nvfp4"], "compressed-tensors"),
        (["--recipe", "best-online", "--activations", "nvfp4"], "mrgptq"), (["--recipe", "best-online", "--format", "mxfp4", "--activations", "mxfp4"], "mrgptq"),
        (["--recipe", "best-online", "--activations", "nvfp4", "--dialect", "fp_quant"], "fp_quant"), (["--recipe", "rtn", "--dialect", "mrgptq"], "mrgptq"),
    ],
)  # fmt: skip
def test_the_dialect_where_none_is_named(options, dialect, run, leaf_folder, tmp_path):
    """The one that most loaders know, unless the recipe rounds inputs as only our own runtime does; W4A16 best-online needs nothing of the sort."""
    status, out, err = run("quantize", leaf_folder, tmp_path / "out", "--dry-run", "--calibration", CALIBRATION, *options)
    assert status == 0, err
    assert re.search(r"^  dialect +(\S+)$", out, re.MULTILINE)[1] == dialect


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
        (["--calibration", CALIBRATION, "--recipe", "mr-gptq", "--rotation", "0", "--tokens", "1e4", "--sequence", "100"], 28, ["NVFP4 W4A16\n", "10000 tokens in windows of 100", "gptq", "activation\n", "fpquant_mse", "damping", "0.01"]),
        (["--calibration", CALIBRATION, "--tokens", "1e4"], 28, ["NVFP4 W4A16\n", "9728 tokens in windows of 512", "rotation        none", "scales          gptq", "order           group", "damping         0.05", "cross           0.4", "output Hessian  fisher"]),
        (["--calibration", CALIBRATION, "--rotation", "32", "--cross", "0", "--output-hessian", "none"], 28, ["NVFP4 W4A16, Hadamard 32\n", "scales     gptq"]),
        (["--calibration", CALIBRATION, "--recipe", "best-online", "--format", "mxfp4", "--activations", "mxfp4"], 28, ["MXFP4 W4A4, Hadamard 32, activations by mse\n", "mrgptq\n"]),
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


@pytest.mark.parametrize("dialect", ["compressed-tensors", "fp_quant", "mrgptq"])
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


def test_an_interrupt_says_what_is_kept_and_the_same_command_goes_on(run, leaf_folder, tmp_path, monkeypatch):
    def stop(self, stage, done, total):
        if done == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli._Progress, "__call__", stop)
        status, out, err = run("quantize", leaf_folder, tmp_path / "out", "--recipe", "rtn")
    kept = tmp_path / ".out.partial"
    assert (status, out) == (130, "") and f"interrupted; what is done is kept in {kept}: the same command goes on from there" in err and list(tmp_path.iterdir()) == [kept]
    status, out, err = run("quantize", leaf_folder, tmp_path / "out", "--recipe", "rtn", "--format", "mxfp4")
    assert (status, out) == (1, "") and f'{kept} was begun by a run with recipe.format "nvfp4"; this one has "mxfp4"' in err
    status, out, err = run("quantize", leaf_folder, tmp_path / "out", "--recipe", "rtn")
    assert status == 0 and "28 layers" in out and list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("arguments", [[], ["frobnicate"], ["quantize"], ["quantize", "a"], ["quantize", "a", "b", "--format", "int4"], ["quantize", "a", "b", "--recipe", "better"], ["quantize", "a", "b", "--cross", "much"], ["quantize", "a", "b", "--tokens", "0"], ["quantize", "a", "b", "--tokens", "1e400"], ["quantize", "a", "b", "--tokens", "1.5"], ["quantize", "a", "b", "--dialect", "gguf"], ["quantize", "a", "b", "--unknown"], ["evaluate", "a"], ["generate", "a"], ["generate", "a", "b", "--tokens", "0"], ["inspect"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: mrgptq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["quantize", "evaluate", "generate", "inspect", "Hugging Face layout", "Exit status: 0 done, 1 refused", "2 wrong usage", "on a CPU"]),
        (["quantize", "--help"], ["default: best)", "best-online", "the least error", "default: compressed-tensors; mrgptq for W4A4 best-online", "--cross", "rtn", "gptq", "mr-gptq", "ignores the rotation", "--rotation 0", "--dry-run", "examples", "mxfp4", "must not exist", "compressed-tensors", "fp_quant", "default: lm_head", "65536", "UTF-8"]),
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


def offset_shares(folder, name, leaf_folder):
    """The words of a layer's line of offsets, counted from the stored bytes and from the weights: absmax by ml_dtypes under the stored divisor."""
    with safetensors.safe_open(leaf_folder / "model.safetensors", "pt") as file:
        weight = file.get_tensor(f"{name}.weight").float().numpy()
    matrix = mg.load(folder)[f"{name}.weight"]
    weight = matrix.rotation.apply(weight)
    sixth = np.abs(weight.reshape(len(weight), -1, 16)).max(-1) / np.float32(6) * np.float32(matrix.tensor_scale)
    steps, counts = np.unique(matrix.scales.astype(int) - sixth.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), return_counts=True)
    for step, share in zip(steps, counts / counts.sum(), strict=True):
        if share >= 0.005:
            yield from (f"{step:+d}:" if step else "0:", f"{100 * share:.0f}", "%")


def test_a_reader_that_has_gone_is_no_error(finished, leaf_folder, tmp_path):
    """inspect OUT | head: the output ends where nobody reads on, without a word and with status 0. The second command's waits in the buffer until its end."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for command in (["inspect", finished[0]], ["quantize", leaf_folder, tmp_path / "out", "--recipe", "rtn", "--dry-run"]):
        process = subprocess.Popen([sys.executable, "-m", "mrgptq.cli", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered)
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.parametrize("recorded", ["mr-gptq", "best", None])
def test_inspect_shows_errors_bits_and_the_histogram_of_scales(recorded, finished, best, run, leaf_folder, tmp_path):
    if recorded:
        folder, dtype = (finished if recorded == "mr-gptq" else best)[0], ml_dtypes.float8_e4m3fn
        status, out, _ = run("inspect", folder)
        layers = layers_of(folder)
        errors, offsets = (
            {line.split()[0]: line.split()[1:] for line in part.splitlines() if line.startswith("model.layers")} for part in out.split("\nlayer", 2)[1:]
        )  # two tables, one below the other
        rounds, damping = {"mr-gptq": (0, "0.01"), "best": (recipe_of(folder).rounds, "0.05")}[recorded]
        for name, r in layers.items():
            assert 0 <= len(r["damped_errors"]) - 1 <= rounds and (recorded == "mr-gptq" or len(r["damped_errors"]) > 1)
            assert errors.pop(name) == [
                "gptq", str(r["rows"]), str(r["cols"]), f"{r['rounded_error']:.4g}", f"{r['relative_error']:.4g}", *([f"{r['rounded_output_error']:.4g}", f"{r['output_error']:.4g}"] if recorded == "best" else []), str(len(r["damped_errors"]) - 1), f"{r['weight_error']:.4g}", damping, "0", "–",
            ]  # fmt: skip
            assert " ".join(offsets.pop(name)) == " ".join(offset_shares(folder, name, leaf_folder))
        assert not errors and not offsets and "rounded: the relative error that plain absmax rounding would have had" in out and "steps from absmax" in out
        bits = 8 * (786432 * (1 / 2 + 1 / 16) + 28 * 4) / 786432
        assert f"NVFP4 W4A4{', Hadamard 16' if recorded == 'mr-gptq' else ''}, 28 layers" in out and "fallback" in out and "Recipe for nvfp4, W4A4" in out
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
    (tmp_path / "text.txt").write_text("once")
    more = ["--text", tmp_path / "text.txt"] if command == "evaluate" else []
    status, out, err = run(command, leaf_folder, *more)
    assert (status, out) == (1, "") and words in err.splitlines()[-1]
    status, out, err = run(command, tmp_path / "nowhere", *more)
    assert (status, out) == (1, "") and "nowhere" in err.splitlines()[-1]
