"""The study's page: complete in itself, its numbers those that were measured, its figures vector drawings that can be read in black and white."""

import dataclasses
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import safetensors.numpy
from scipy import stats

import mrgptq as mg
from mrgptq import cli
from mrgptq.study.analysis import Crossover, Mean, simulate
from mrgptq.study.distributions import Laplace, Normal
from mrgptq.study.findings import GROUP_KURTOSIS, RULES, collect
from mrgptq.study.grids import FORMATS
from mrgptq.study.report import page, write_report
from mrgptq.study.weights import KEYS, WeightRow, rotation_gain, weight_rows

VALUES = 1 << 14


class Page(HTMLParser):
    """Tables as lists of rows, headings, every address and tag."""

    VOID = {"meta"}

    def __init__(self, text):
        super().__init__()
        self.tables, self.headings, self.addresses, self.tags, self._open, self._cell = [], [], [], [], [], None
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href") and not value.startswith("#")]
        if tag not in self.VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href") and not value.startswith("#")]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self._open and self._open[-1] == "h2":
            self.headings[-1] += data


@pytest.fixture(scope="module")
def findings(leaf_folder):
    calls = []
    found = collect(leaf_folder, values=VALUES, progress=lambda *state: calls.append(state))
    assert [call[1] for call in calls] == list(range(1, len(calls) + 1)) and {call[2] for call in calls} == {len(calls)}
    return found


@pytest.fixture(scope="module")
def text(findings):
    return page(findings, ["study", "a model", "--out", "x.html"])


def test_the_page_needs_nothing_else(text):
    """No script, no address but those inside the page, no raster image; what every tag opens it closes."""
    parsed = Page(text)
    assert parsed.addresses == [] and not {"script", "link", "img", "image", "iframe"} & set(parsed.tags)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|rdf:resource="[^"]*"', "", text)
    assert "mrgptq study 'a model' --out x.html" in text.replace("&#x27;", "'")


def test_figures_are_vector_drawings_in_black_and_white(text):
    """Text is text, every colour is black or white, and every figure says what it is."""
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 5 == text.count("<figcaption>")
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "<text" in drawing and set(re.findall(r"(?:fill|stroke): (#\w+)", drawing)) <= {"#000000", "#ffffff", "#b0b0b0"}  # the last is the grid's
    assert text.count("<svg") == len(drawings)


def test_tables_hold_what_was_measured(findings, text):
    """Read back from the page, against a measurement made here and against the core's own error of a layer."""
    rules, sizes, transforms, tails, mass, layers = Page(text).tables
    assert [row[0] for row in rules[1:]] == list(RULES)
    for label, cell in ((row[0], row[1]) for row in rules[1:]):
        mean = simulate(RULES[label], Laplace(), values=VALUES).mse
        assert cell == f"{1e3 * mean.value:.2f} ± {1e3 * mean.standard_error:.2f}"
    assert [row[0] for row in sizes[1:]] == ["4", "8", "16", "32", "64", "128"] and len(transforms) == 9 and len(tails) == 5 and len(mass) == 10
    by_name = {row[0]: row for row in layers[1:]}
    assert len(by_name) == 28
    name = "model.layers.1.mlp.up_proj"
    weight = np.asarray(mg.load(findings.model)[f"{name}.weight"], dtype=np.float32)
    for format, column in (("mxfp4", 2), ("nvfp4", 4)):
        size = {"mxfp4": 32, "nvfp4": 16}[format]
        for at, turned in enumerate((weight, mg.Hadamard(size).apply(weight))):
            groups = turned.astype(np.float64).reshape(-1, size)
            error = FORMATS[format].round(groups) - groups  # NumPy's, in float64: one value in a thousand is at a tie in the core's float32
            expected = 1e3 * ((error**2).sum(-1) / (groups**2).sum(-1)).mean()
            assert abs(float(by_name[name][column + at]) - expected) < 0.006  # two digits
    groups = weight.astype(np.float64).reshape(-1, 32)
    symmetric = np.concatenate([groups, -groups], 1)  # about 0, which the study takes for the mean
    assert abs(float(by_name[name][1]) - stats.kurtosis(symmetric, axis=1, fisher=False).mean()) < 0.0051


def test_every_section_says_how_to_get_its_numbers(text, capsys):
    """The Python on the page prints what the table beside it says: every mean of a table, to its digits."""
    sections = re.findall(r"<table>.*?</table>.*?<pre>(.*?)</pre>", text, re.DOTALL)
    tables = Page(text).tables
    assert len(sections) == len(tables) == 6
    for code, table in zip(sections, tables, strict=True):
        capsys.readouterr()
        exec(html.unescape(code), {})
        printed = capsys.readouterr().out
        numbers = {f"{1e3 * float(number):.2f}" for number in re.findall(r"\d+\.\d+(?:e-\d+)?", printed)} | {f"{float(number):.6f}" for number in re.findall(r"0\.\d{6,}", printed)}
        shown = {cell.split(" ± ")[0] for row in table[1:] for column, cell in enumerate(row) if re.fullmatch(r"\d+\.\d+( ± .*)?", cell) and table[0][column] != "kurtosis"}
        assert len(shown) > 10 and shown <= numbers, (table[0], shown - numbers)


def test_a_layer_is_measured_some_rows_at_a_time(findings, monkeypatch):
    """As few as one: large layers are not widened at once. Sums of another order."""
    name = "model.layers.1.mlp.down_proj"
    (whole,) = [row for row in findings.layers if row.name == name]
    for values in (1, 1000):
        monkeypatch.setattr("mrgptq.study.weights._BATCH", values)
        (row,) = weight_rows(findings.model, [name])
        assert row.kurtosis == pytest.approx(whole.kurtosis, rel=1e-12)
        assert row.plain == pytest.approx(whole.plain, rel=1e-12) and row.rotated == pytest.approx(whole.rotated, rel=1e-12)


def test_layers_that_cannot_be_measured_are_named(findings, leaf_folder, tmp_path):
    """Columns that 32 does not divide, zeros; where all are such, and where a weight is not finite, the study refuses."""
    rng = np.random.default_rng(0)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": rng.standard_normal((8, cols)).astype(np.float32) for i, cols in enumerate((48, 64, 32, 16))}
    tensors["model.layers.2.mlp.up_proj.weight"][:] = 0
    (tmp_path / "config.json").write_text("{}")
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    found = collect(tmp_path, values=1024)
    assert [row.name for row in found.layers] == ["model.layers.1.mlp.up_proj"]
    text = page(found, ["study"])
    assert "Not among them, since groups of 32 do not divide its columns: model.layers.0.mlp.up_proj, model.layers.3.mlp.up_proj. Not among them, since it is zero: model.layers.2.mlp.up_proj." in text
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is nan at row 3, column 5"):
        list(weight_rows(tmp_path))
    safetensors.numpy.save_file({name: value for name, value in tensors.items() if value.shape[1] % 32}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"groups of 32 divide the columns of no linear layer; 'model\.layers\.0\.mlp\.up_proj' has 48"):
        collect(tmp_path, values=1024)


@pytest.mark.parametrize(("config", "words"), [({"model_type": "gpt2"}, "stores its layers transposed"), ({"quantization_config": {"quant_method": "compressed-tensors"}}, "is quantised already")])
def test_models_whose_weights_are_not_read_as_they_stand_are_refused(config, words, tmp_path, run):
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file({"model.layers.0.mlp.up_proj.weight": np.ones((32, 64), np.float32)}, tmp_path / "model.safetensors")
    status, _, err = run("study", tmp_path, "--out", tmp_path / "a.html", "--values", "1024")
    assert status == 1 and words in err and not (tmp_path / "a.html").exists()


def test_the_sentence_on_group_sizes_says_what_can_be_told(findings):
    """By two standard errors."""
    rows = [Crossover(size, Mean(1.0, 0.03), Mean(value, 0.04)) for size, value in ((4, 1.2), (8, 1.09), (16, 0.91), (32, 0.8))]
    text = page(dataclasses.replace(findings, crossovers={"e4m3": rows}), ["study"])
    assert "a rotation helps in groups of 32; does harm in groups of 4; cannot be told apart from none in groups of 8, 16 (by two standard errors)" in text


def test_sentences_follow_the_numbers(findings, text):
    gain = rotation_gain(findings.layers, "mxfp4")
    helped = sum(row.rotated["mxfp4"] < row.plain["mxfp4"] for row in findings.layers)
    assert f"{gain:.3f} (MXFP4, {helped} of 28 layers gain)" in text
    (mx,) = [row for row in findings.rules if row.label == "MXFP4 even"]
    assert f"MXFP4&#x27;s error {100 * (1 - mx.rotated.mse.value / mx.laplace.mse.value):.0f} % smaller" in text


def test_without_a_model_there_is_no_section_on_one(findings, tmp_path):
    bare = page(dataclasses.replace(findings, model=None, layers=[]), ["study"])
    assert len(Page(bare).tables) == 5 and "own weights" not in bare
    write_report(findings, tmp_path / "a.html", ["study"])
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page(findings, ["study"])
    with pytest.raises(FileExistsError):
        write_report(findings, tmp_path / "a.html", ["study"])


@pytest.mark.parametrize("cut", ["mrgptq.study.report.page", "os.fsync"])
def test_a_page_is_there_whole_or_not_at_all(cut, findings, tmp_path, monkeypatch):
    """Interrupted while it is drawn, and while it is written."""

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cut, interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_report(findings, tmp_path / "a.html", ["study"])
    assert list(tmp_path.iterdir()) == []


def test_what_loses_nothing_has_no_ratio(findings):
    """Weights that a rotation puts on the grid; a model of zeros, whose methods all leave it as it is."""
    from mrgptq.study.methods import GridRow

    exact = WeightRow("exact", 32.0, dict.fromkeys(KEYS, 0.0), dict.fromkeys(KEYS, 0.0))
    rows = [GridRow(method, "mxfp4", "mxfp4", None, 40.0, 0.0, 1.0, (0.0, 0.0)) for method in ("rtn", "rtn-hadamard", "gptq", "mr-gptq")]
    text = page(dataclasses.replace(findings, layers=[exact], methods=[GridRow("original", None, None, None, 40.0, 0.0, 0.0), *rows]), ["study"])
    assert "divides the weights' error by 1.000 (MXFP4, 0 of 1 layers gain)" in html.unescape(text)
    assert "A Hadamard before" not in text and "That the divergence falls" not in text  # there is nothing to compare


def test_the_command_writes_the_page(leaf_folder, tmp_path, capsys):
    """Twice the same; a file that is there is not overwritten, a folder that is no model is refused before anything is drawn."""
    for name in ("a.html", "b.html"):
        assert cli.main(["study", str(leaf_folder), "--out", str(tmp_path / name), "--values", "4096", "--seed", "7"]) == 0
    first, second = ((tmp_path / name).read_text(encoding="utf-8").replace(name, "") for name in ("a.html", "b.html"))
    assert first == second and "--values 4096 --seed 7" in first
    assert "the weights of" in capsys.readouterr().out
    for arguments, words in ((["--out", tmp_path / "a.html"], "a.html exists already"), (["--out", tmp_path / "c.html", "--text", tmp_path / "a.html"], "--calibration and --text go together"), ([tmp_path, "--out", tmp_path / "c.html"], "has no safetensors file")):
        assert cli.main(["study", *map(str, arguments)]) == 1
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "c.html").exists()


def test_what_methods_cost_is_on_the_page_where_texts_are_given(findings, leaf_folder, tmp_path, capsys, monkeypatch):
    """A row a cell, as the grid measured them; sentences say where the published order comes out and where it does not."""
    from mrgptq.study import methods

    def row(method, format, activations, divergence, spread):
        return methods.GridRow(method, format, activations, 0.01, 40.0, divergence, 1.0, (divergence - spread, divergence + spread))

    cells = {
        ("nvfp4", "nvfp4"): {"rtn": (0.4, 0.1), "rtn-hadamard": (0.5, 0.06), "gptq": (0.3, 0.1), "mr-gptq": (0.2, 0.1), "best": (0.1, 0.1)},
        ("int4", None): {"gptq": (0.3, 0.1), "mr-gptq": (0.36, 0.04)},
        ("int4", "int4"): {"gptq": (0.3, 0.1), "mr-gptq": (0.24, 0.04)},
        ("mxfp4", "mxfp4"): {"gptq": (0.3, 0.1), "mr-gptq": (0.2, 0.1), "best": (0.25, 0.1), "best-hadamard": (0.1, 0.1)},
    }
    rows = [methods.GridRow("original", None, None, None, 35.0, 0.0, 0.0), *(row(method, *kind, *values) for kind, found in cells.items() for method, values in found.items())]
    asked = []
    monkeypatch.setattr(methods, "grid", lambda *arguments, **options: asked.append((arguments, options)) or iter(rows))
    for name in ("calibration", "text"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert cli.main(["study", str(leaf_folder), "--out", str(tmp_path / "a.html"), "--values", "1024", "--calibration", str(tmp_path / "calibration"), "--text", str(tmp_path / "text"), "--windows", "3", "--threads", "1", "--methods", "gptq, best", "--formats", "nvfp4"]) == 0
    assert asked == [((leaf_folder, "calibration", "text"), {"methods": ["gptq", "best"], "formats": ["nvfp4"], "windows": 3, "test_windows": 3, "device": "cpu", "threads": 1})]
    assert "methods: 4 measurements of" in capsys.readouterr().err
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    divergences, _, table = Page(text).tables[-3:]
    assert divergences[0] == ["KL(original || quantised), nats a token", "NVFP4 W4A4", "INT4 W4A16", "INT4 W4A4", "MXFP4 W4A4"]
    assert divergences[1:] == [[name, *(f"{found[name][0]:.4f}" if name in found else "–" for found in cells.values())] for name in ("rtn", "rtn-hadamard", "gptq", "mr-gptq", "best", "best-hadamard")]
    assert len(table) == 15 and table[2] == ["rtn", "NVFP4", "W4A4", "1.00e-02", "40.000", "0.4000"] and table[1][4] == "35.000"
    assert "A Hadamard before plain rounding: NVFP4 W4A4 25 % larger (± 10 %)." in text  # the differences are 0.14 and 0.06
    assert "from MR-GPTQ to best, where each was measured, comes out in NVFP4 W4A4; cannot be told in INT4 W4A16, INT4 W4A4; does not come out in MXFP4 W4A4." in text and "over 2 windows of the text" in text
    changes = Page(text).tables[-2]
    assert changes == [
        ["divergence against", "rtn-hadamard, over rtn", "mr-gptq, over gptq", "best, over mr-gptq", "best-hadamard, over mr-gptq"],
        ["NVFP4 W4A4", "25 % larger (± 10 %)", "33 % smaller (± 0 %)", "50 % smaller (± 0 %)", "–"],
        ["INT4 W4A16", "–", "20 % larger (± 20 %)", "–", "–"],
        ["INT4 W4A4", "–", "20 % smaller (± 20 %)", "–", "–"],
        ["MXFP4 W4A4", "–", "33 % smaller (± 0 %)", "25 % larger (± 0 %)", "50 % smaller (± 0 %)"],
    ]
    assert len(re.findall("<svg", text)) == 6 and "--windows 3 --methods gptq,best --formats nvfp4" in text


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, run):
    for out in (tmp_path / "nowhere" / "a.html", tmp_path / "file" / "a.html"):
        (tmp_path / "file").write_text("")
        status, _, err = run("study", "--out", out, "--values", "1024")
        assert status == 1 and "cannot be written" in err and "study:" not in err
    status, _, err = run("study", "--out", tmp_path / "a.html", "--values", "3")
    assert status == 1 and "values is 3; means and their standard errors want 1024 or more" in err and not (tmp_path / "a.html").exists()


def test_every_id_is_the_pages_only_one(findings):
    text = page(findings, ["study"])
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 100 and set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(ids)


def test_what_methods_would_cost_too_much_is_refused_before_anything_is_drawn(leaf_folder, tmp_path, run):
    """Unknown names too, and options that are about methods where none are measured."""
    (tmp_path / "text").write_text("text", encoding="utf-8")
    texts = ["--calibration", tmp_path / "text", "--text", tmp_path / "text"]
    for options, words in (
        ([*texts, "--memory-limit", "1MB"], r"the run is expected to take \d+\.\d MB and what the libraries take; the limit is 1 MB"),
        ([*texts, "--methods", "rtn,quest"], r"unknown method 'quest'; known: .*quarot"),
        ([*texts, "--formats", "fp8"], r"unknown format 'fp8'; known: .*int4"),
        ([*texts, "--formats", "int4", "--methods", "best"], r"there is no such cell"),
        (["--methods", "rtn"], r"about what methods cost a model: give --calibration and --text"),
    ):
        status, out, err = run("study", leaf_folder, "--out", tmp_path / "a.html", *options)
        assert status == 1 and re.search(words, err.splitlines()[-1]) and "study:" not in err, err
    assert not (tmp_path / "a.html").exists()


def test_a_page_needs_no_torch_and_leaves_the_backend_as_it_was():
    """In a process of its own: whoever draws beside it keeps the backend of their choice."""
    code = "import sys, matplotlib; matplotlib.use('svg'); import mrgptq.study.report; assert matplotlib.get_backend() == 'svg' and 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("distribution", [Normal(), Laplace()], ids=lambda d: d.name)
def test_the_kurtosis_of_groups_is_the_one_that_the_page_compares_with(distribution):
    """Within four standard errors and half of the last digit said."""
    groups = distribution.sample(1 << 17, 32, np.random.default_rng(0))
    each = (groups**4).mean(-1) / (groups**2).mean(-1) ** 2
    assert abs(each.mean() - GROUP_KURTOSIS[distribution.name]) < 4 * each.std() / np.sqrt(len(each)) + 0.005
