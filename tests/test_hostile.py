"""Checkpoints that somebody made to do harm: refused by file, tensor and reason; nothing is waited for, nothing is read from elsewhere. What transformers is handed: test_hostile_models.py."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refusals import refusal

import mrgptq as mg
from mrgptq import cli
from mrgptq.checkpoint import safetensors as ours
from mrgptq.checkpoint.reader import CheckpointReader
from mrgptq.checkpoint.safetensors import SafetensorsFile

INDEX = "model.safetensors.index.json"
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two shards, with config.json and a tokenizer of sorts."""
    made = tmp_path / "model"
    made.mkdir()
    for name in ("a", "b"):
        safetensors.numpy.save_file({name: np.ones(3, np.float32)}, made / f"{name}.safetensors")
    (made / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    (made / "config.json").write_text("{}")
    return made


# ---- What is no regular file, or lies elsewhere


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", INDEX])
def test_what_would_be_waited_for_is_refused(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "a pipe":
        os.mkfifo(path)  # whoever opens it waits for a writer
    elif kind == "a folder":
        path.mkdir()
    else:
        try:
            os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero, which never ends
        except PermissionError:
            pytest.skip("only root makes devices")
    if name == "config.json":
        safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "model.safetensors")
        assert refusal(lambda: CheckpointReader(tmp_path).config) == f"{path} is {kind}; only a regular file is read"
    else:
        if kind != "a folder":
            assert refusal(lambda: CheckpointReader(path)) == f"{path} is {kind}; only a regular file is read"
        assert str(tmp_path) in refusal(lambda: CheckpointReader(tmp_path), (ValueError, FileNotFoundError))


def test_a_shard_that_is_a_pipe_is_no_file(folder):
    (folder / "b.safetensors").unlink()
    os.mkfifo(folder / "b.safetensors")
    assert "places tensor 'b' in b.safetensors, but" in refusal(lambda: CheckpointReader(folder), FileNotFoundError)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "a" * 300}}))  # longer than a name may be
    assert "has no such file" in refusal(lambda: CheckpointReader(folder), FileNotFoundError)


@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "a.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, name):
    target = tmp_path / "elsewhere"
    source = folder / ("a.safetensors" if name == "model.safetensors" else name)
    shutil.copy(source, target)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)

    def read():
        reader = CheckpointReader(folder)
        return reader.tensor("a"), reader.config

    message = refusal(read)
    assert f"{folder / name} is a link to {target}, outside its folder; links that lead out of one are not followed" in message
    (folder / name).unlink()
    shutil.copy(target, folder / "inside")
    (folder / name).symlink_to("inside")
    read()
    (folder / name).unlink()
    (folder / name).symlink_to(name)  # to itself: as good as none
    if name == "model.safetensors":
        read()
    else:
        assert name in refusal(read, (ValueError, OSError))


def test_the_path_itself_may_be_a_link(folder, tmp_path):
    (tmp_path / "folder").symlink_to(folder)
    (tmp_path / "file").symlink_to(folder / "a.safetensors")
    assert CheckpointReader(tmp_path / "folder").shape("b") == CheckpointReader(tmp_path / "file").shape("a") == (3,)


def test_a_file_that_has_shrunk_is_refused_before_it_is_read(folder):
    reader = CheckpointReader(folder)
    kept = reader.tensor("a")
    os.truncate(folder / "a.safetensors", 8)
    message = refusal(lambda: reader.tensor("a"))
    assert all(words in message for words in (f"{folder}/a.safetensors had ", "has 8 now", "truncated meanwhile", "tensor 'a' is not read")), message
    assert kept.shape == (3,)  # its numbers are gone: whoever reads them is killed
    (folder / "b.safetensors").unlink()
    assert "no such file" in refusal(lambda: reader.tensor("b"), FileNotFoundError).lower()


# ---- Headers and configurations that are large, deep or strange


def raw(header, data=b""):
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize("name", ["n" * 1_000_000, "\x1b[2J\r" * 1000, "../../etc/passwd", "/etc/passwd", "a\\..\\b", "\u202e"])
def test_any_name_of_a_tensor_is_a_name_and_no_path(tmp_path, name):
    safetensors.numpy.save_file({name: np.arange(3, dtype=np.int8)}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    assert file.names == (name,) and np.asarray(file.tensor(name)).tolist() == [0, 1, 2]
    matrix = mg.quantize(np.ones((1, 16)), "nvfp4")
    mg.save(tmp_path / "out", {"x.weight": matrix, name: file.tensor(name)})
    assert sorted(os.listdir(tmp_path)) == ["f", "out"] and sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json", "model.safetensors", "mrgptq.json"]
    assert np.asarray(mg.load(tmp_path / "out")[name]).tolist() == [0, 1, 2]
    for ask in (lambda: file.tensor(name + "x"), lambda: SafetensorsFile.__init__(file, bad)):
        bad = tmp_path / "bad"
        bad.write_bytes(raw(json.dumps({name: {"dtype": "U9", "shape": [], "data_offsets": [0, 0]}}).encode()))
        message = refusal(ask)
        assert message.isprintable() and len(message) < 1000


def test_names_are_compared_for_a_hint_as_far_as_that_is_cheap(tmp_path, monkeypatch):
    safetensors.numpy.save_file({f"layers.{i}.q_proj": np.ones(1) for i in range(9)} | {"l" * 300: np.ones(1)}, tmp_path / "f")
    monkeypatch.setattr(ours, "_MOST_COMPARED", 3)
    file = SafetensorsFile(tmp_path / "f")
    assert "near names are 'layers.7.q_proj'" in refusal(lambda: file.tensor("layers.7.q_prj"))
    assert "none of its 10 names is near" in refusal(lambda: file.tensor("l" * 299))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_has_not_are_refused_in_a_header_and_kept_in_a_configuration(tmp_path, value):
    header = f'{{"a":{{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":{value}}}}}'.encode()
    (tmp_path / "f").write_bytes(raw(header, b"1"))
    assert f"{value} is no number of JSON" in refusal(lambda: SafetensorsFile(tmp_path / "f"))
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(f'{{"time_step_limit": [0.0, {value}]}}')  # as transformers has written it
    assert not np.isfinite(CheckpointReader(tmp_path).config["time_step_limit"][1])


def test_a_deep_configuration_is_refused(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(1)}, tmp_path / "model.safetensors")
    for depth, allowed in ((99, True), (100, False), (100_000, False)):
        for begin, end in (('{"text_config":', "}"), ("[", "]")):
            (tmp_path / "config.json").write_text('{"a":' + begin * depth + "0" + end * depth + "}")
            if allowed:
                json.dumps(CheckpointReader(tmp_path).config, indent=2)
            else:
                message = refusal(lambda: CheckpointReader(tmp_path).config)
                assert str(tmp_path / "config.json") in message and ("more than 100" in message or "recursion" in message)


# ---- Quantised layers


DIALECTS = {"compressed-tensors": mg.Recipe.named("rtn", "nvfp4", activations="nvfp4"), "fp_quant": mg.Recipe.named("rtn", "mxfp4", "fp_quant", "mxfp4"), "mrgptq": mg.Recipe.named("rtn", "nvfp4")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of each dialect, with a layer of 4 x 64, and its config and tensors."""

    def save(dialect):
        path = tmp_path_factory.mktemp("saved") / "out"
        matrix = mg.quantize_layer(np.random.default_rng(0).standard_normal((4, 64)), None, DIALECTS[dialect])
        if matrix.activations is not None and matrix.activations.format == "nvfp4":
            matrix = mg.QuantizedMatrix(matrix.format, matrix.codes, matrix.scales, matrix.tensor_scale, matrix.rotation, mg.Activations("nvfp4", tensor_scale=2.0))
        mg.save(path, {f"{NAME}.weight": matrix, "norm.weight": np.ones(4, np.float32)}, dialect)
        reader = CheckpointReader(path)
        return path, json.loads((path / "config.json").read_text()), {name: reader.tensor(name) for name in reader.names}

    return {dialect: save(dialect) for dialect in DIALECTS}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.sampled_from(["nvfp4", "mxfp4", "float", "hadamard", "input", "absmax", 16, 32, 64, 2**40]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "format", "weights", "v", "apply", "location", "config_groups", "head_dim", "rule"]), inner, max_size=3),
    max_leaves=8,
)


def places(value, path=()):
    """Every path into nested tables and lists, the whole first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_quantization_config_is_understood_or_refused_in_a_sentence(saved, data):
    path, config, _ = saved[data.draw(st.sampled_from(list(DIALECTS)))]
    config = json.loads(json.dumps(config))
    *above, last = data.draw(st.sampled_from([("quantization_config", *place) for place in places(config["quantization_config"])]))
    parent = config
    for key in above:
        parent = parent[key]
    value = data.draw(st.just("gone") | JSON)
    if value == "gone" and isinstance(parent, dict):
        del parent[last]
    else:
        parent[last] = value
    (path / "config.json").write_text(json.dumps(config))
    try:
        assert set(mg.load(path)) >= {"norm.weight"}
    except ValueError as refused:
        assert str(path) in str(refused) and str(refused).isprintable()


@settings(max_examples=400, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tensors_of_a_layer_are_understood_or_refused_in_a_sentence(saved, tmp_path_factory, data):
    _, config, tensors = saved[data.draw(st.sampled_from(list(DIALECTS)))]
    tensors = dict(tensors)
    name = data.draw(st.sampled_from([name for name in tensors if name.startswith(NAME)]))
    dtype = data.draw(st.sampled_from([tensors[name].dtype] * 3 + list(ours.BITS_DTYPE)))
    shape = data.draw(st.sampled_from([tensors[name].bits.shape] * 3) | st.lists(st.sampled_from([0, 1, 2, 3, 4, 16, 32, 64]), max_size=3).map(tuple))
    if dtype == "F4" and not shape:
        shape = (1,)
    filling = data.draw(st.sampled_from([0, 0x7F, 0x80, 0xFF]))
    bits = np.frombuffer(bytes([filling]) * (int(np.prod(shape)) * ours.BITS_DTYPE[dtype].itemsize), ours.BITS_DTYPE[dtype]).reshape(shape)
    tensors[name] = ours.StoredTensor.from_bits(dtype, bits)
    path = tmp_path_factory.mktemp("f")
    (path / "config.json").write_text(json.dumps(config))
    ours.write_file(path / "model.safetensors", tensors)
    try:
        layer = mg.load(path).get(f"{NAME}.weight")
        if isinstance(layer, mg.QuantizedMatrix):
            assert not np.isnan(layer.dequantize()).any()
    except ValueError as refused:
        assert str(path) in str(refused) and NAME in str(refused)


@pytest.mark.parametrize(("dialect", "part", "bits", "where"), [("compressed-tensors", "weight_scale", 0xFF, "row 1, column 3"), ("fp_quant", "scales", 0xFF, "row 1, column 1"), ("mrgptq", "weight_scale", 0x7F, "row 1, column 3")])
def test_scales_that_are_no_numbers_are_refused(saved, tmp_path, dialect, part, bits, where):
    _, config, tensors = saved[dialect]
    scales = tensors[f"{NAME}.{part}"]
    damaged = scales.bits.copy()
    damaged[1, -1] = bits
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours.write_file(tmp_path / "model.safetensors", tensors | {f"{NAME}.{part}": ours.StoredTensor.from_bits(scales.dtype, damaged)})
    assert f"{tmp_path}: {NAME}.{part} is NaN at {where}; every scale must be a number" == refusal(lambda: mg.load(tmp_path))


def test_one_weight_twice_is_refused(saved, tmp_path):
    _, config, tensors = saved["mrgptq"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours.write_file(tmp_path / "model.safetensors", tensors | {f"{NAME}.weight": np.ones((4, 64), np.float32)})
    assert f"{tmp_path} has a tensor '{NAME}.weight' beside the packed one of that name" == refusal(lambda: mg.load(tmp_path))


@pytest.mark.parametrize("key", ["model_type", "hidden_size", "vocab_size", "quantization_config"])
def test_settings_of_another_form_are_refused_before_anything_is_computed(tmp_path, key, capsys):
    safetensors.numpy.save_file({f"{NAME}.weight": np.ones((2, 32), np.float32)}, tmp_path / "model.safetensors")
    for value in ([1], "x" * 1000, {"a": 1}, 0, -1, 1.5, True, 10**400, [], {}, "", None):
        (tmp_path / "config.json").write_text(json.dumps({key: value}))
        status = cli.main(["quantize", str(tmp_path), str(tmp_path / "out"), "--recipe", "rtn"])
        said = capsys.readouterr().err
        if status:
            assert said.startswith("mrgptq: ") and (f"config.json has {key} " in said or "is quantised already" in said) and not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


# ---- What a terminal is shown


def test_inspect_shows_any_scales_and_no_control_characters(saved, tmp_path, capsys):
    _, config, tensors = saved["mrgptq"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = "\x1b[2J.layers.0.up_proj"
    for bits, words in ((0, "every scale is zero"), (0x80, "every scale is zero"), (0xB8, "2^0")):
        scales = ours.StoredTensor.from_bits("F8_E4M3", np.full((4, 4), bits, np.uint8))
        ours.write_file(tmp_path / "model.safetensors", {n.replace(NAME, name): t for n, t in tensors.items()} | {f"{name}.weight_scale": scales})
        (tmp_path / "mrgptq.json").write_text(json.dumps({"layers": {name: {"method": "\x1b]0;x\x07"}}}))
        assert cli.main(["inspect", str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert words in shown and "\\x1b[2J.layers" in shown and "\x1b" not in shown
        (tmp_path / "model.safetensors").unlink()
    ours.write_file(tmp_path / "model.safetensors", {f"{name}.weight_packed": np.ones((1, 8), np.uint8), "near\x1b": np.ones(1)})
    assert cli.main(["inspect", str(tmp_path)]) == 1
    assert "\x1b" not in (said := capsys.readouterr().err) and "no tensor '\\x1b[2J.layers.0.up_proj.weight_scale'" in said


@pytest.mark.parametrize("record", ["[]", "{", '{"layers": []}', '{"layers": {"a": 1}}', '{"layers": {"a": {"scale_offsets": {"x": 1}}}}', '{"layers": {"a": {"scale_offsets": {"1": 0}}}}', '{"recipe": {"evil": 1}}', '{"recipe": 1}', '{"layers": {"a": {"damped_errors": 7}}}'])
def test_a_record_that_is_none_is_refused(saved, capsys, record):
    path, config, _ = saved["mrgptq"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "mrgptq.json").write_text(record)
    status = cli.main(["inspect", str(path)])
    assert (status, f"{path / 'mrgptq.json'} is" in capsys.readouterr().err) in [(1, True), (0, False)] and status == (record != '{"layers": []}')
