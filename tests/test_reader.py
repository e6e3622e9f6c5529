"""CheckpointReader on folders that the safetensors library wrote."""

import json

import numpy as np
import pytest
import safetensors.numpy

from mrgptq.checkpoint.reader import CheckpointReader

INDEX = "model.safetensors.index.json"
SHARDS = {
    "first.safetensors": {"layers.10.w": np.ones((2, 3), np.float32), "layers.2.w": np.arange(4, dtype=np.float16)},
    "second.safetensors": {"head": np.zeros((0, 5), np.int8)},
}


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, tensors in SHARDS.items():
        safetensors.numpy.save_file(tensors, folder / name)
    write_index(folder, {tensor: name for name, tensors in SHARDS.items() for tensor in tensors})
    return folder


def refusal(error, build):
    with pytest.raises(error) as refused:
        build()
    return str(refused.value)


def test_shards_are_one_set_of_tensors_in_natural_order(sharded):
    reader = CheckpointReader(sharded)
    assert reader.path == sharded
    assert reader.names == ("head", "layers.2.w", "layers.10.w")
    assert "head" in reader and "tail" not in reader
    assert (reader.dtype("layers.2.w"), reader.shape("layers.2.w"), reader.nbytes("layers.2.w")) == ("F16", (4,), 8)
    assert reader.total_bytes == 24 + 8 + 0
    for tensors in SHARDS.values():
        for name, array in tensors.items():
            assert np.array_equal(reader.tensor(name), array) and reader.tensor(name).shape == array.shape
    assert CheckpointReader(sharded / INDEX).names == reader.names


@pytest.mark.parametrize("name", ["model.safetensors", "adapter.safetensors"])
def test_a_single_file_is_found_in_its_folder_or_by_its_path(tmp_path, name):
    safetensors.numpy.save_file({"a10": np.ones(1), "a9": np.ones(2), "a09": np.ones(6, np.float32), "a": np.ones(4)}, tmp_path / name)
    (tmp_path / "config.json").write_text('{"hidden_size": 64}')
    for path in (tmp_path, tmp_path / name, str(tmp_path)):
        reader = CheckpointReader(path)
        assert reader.names == ("a", "a09", "a9", "a10")
        assert reader.shape("a9") == (2,)
        assert reader.config == {"hidden_size": 64}
        assert reader.total_bytes == 80


def test_natural_order_takes_numbers_of_any_length(tmp_path):
    names = ["x1" + "0" * 5000, "x9" * 2, "x9", "x0", "10", "9", "x٣"]
    safetensors.numpy.save_file({name: np.ones(1) for name in names}, tmp_path / "model.safetensors")
    assert CheckpointReader(tmp_path).names == ("9", "10", "x0", "x9", "x9x9", "x1" + "0" * 5000, "x٣")


def test_the_single_file_comes_before_an_index_as_in_transformers(sharded):
    safetensors.numpy.save_file({"whole": np.ones(1)}, sharded / "model.safetensors")
    assert CheckpointReader(sharded).names == ("whole",)


def test_shards_are_opened_when_they_are_needed(sharded):
    (sharded / "second.safetensors").write_bytes(b"damaged!")
    reader = CheckpointReader(sharded)
    assert reader.shape("layers.2.w") == (4,)
    assert "second.safetensors" in refusal(ValueError, lambda: reader.shape("head"))


def test_an_unknown_name_lists_near_ones(sharded):
    reader = CheckpointReader(sharded)
    for ask in (reader.tensor, reader.dtype, reader.shape, reader.nbytes):
        message = refusal(ValueError, lambda ask=ask: ask("layer.2.w"))
        assert f"{sharded} has no tensor 'layer.2.w'; near names are 'layers.2.w', 'layers.10.w'" == message


def test_paths_without_weights_are_refused(tmp_path):
    assert f"no checkpoint at {tmp_path / 'x'}" in refusal(FileNotFoundError, lambda: CheckpointReader(tmp_path / "x"))
    assert f"{tmp_path} has no safetensors file" in refusal(FileNotFoundError, lambda: CheckpointReader(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    message = refusal(FileNotFoundError, lambda: CheckpointReader(tmp_path))
    assert all(words in message for words in (str(tmp_path), "pytorch_model.bin", "pickles", "not read"))
    assert "not a safetensors file" in refusal(ValueError, lambda: CheckpointReader(__file__))


def test_several_files_without_an_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    message = refusal(ValueError, lambda: CheckpointReader(sharded))
    assert all(words in message for words in (str(sharded), "2 safetensors files", "first.safetensors", INDEX))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("[]", ["[]", "JSON object"]),
        ("{", ["JSON", "line 1"]),
        ("{}", ["weight_map None", "tensors to file names"]),
        ('{"weight_map": ["head"]}', ["weight_map ['head']", "tensors to file names"]),
        ('{"weight_map": {"head": 1}}', ["'head'", " 1;", "without any folder"]),
        ('{"weight_map": {"head": "first.safetensors", "head": "second.safetensors"}}', ["'head' occurs twice"]),
    ],
)
def test_a_malformed_index_is_refused(sharded, index, words):
    (sharded / INDEX).write_text(index)
    message = refusal(ValueError, lambda: CheckpointReader(sharded))
    assert all(word in message for word in [str(sharded / INDEX), *words]), message


OUTSIDE = ["../model/first.safetensors", "sub/first.safetensors", "..", ".", "", "/etc/fstab", "C:a", "a\\b", "a\0"]


@pytest.mark.parametrize("place", OUTSIDE)
def test_an_index_that_leaves_the_folder_is_refused(sharded, place):
    (sharded / "sub").mkdir()
    (sharded / "sub" / "first.safetensors").write_bytes((sharded / "first.safetensors").read_bytes())
    write_index(sharded, {"layers.2.w": place})
    assert "places tensor 'layers.2.w' in '" in (message := refusal(ValueError, lambda: CheckpointReader(sharded)))
    assert "without any folder" in message


def test_a_missing_shard_is_refused_with_a_tensor_it_should_hold(sharded):
    (sharded / "first.safetensors").unlink()
    message = refusal(FileNotFoundError, lambda: CheckpointReader(sharded))
    assert f"{INDEX} places tensor 'layers.10.w' in first.safetensors, but {sharded} has no such file" in message


def test_an_index_and_a_shard_that_disagree_are_refused(sharded):
    files = {"layers.2.w": "first.safetensors", "layers.10.w": "first.safetensors", "head": "second.safetensors"}
    write_index(sharded, files | {"head": "first.safetensors"})
    message = refusal(ValueError, lambda: CheckpointReader(sharded).shape("layers.2.w"))
    assert f"first.safetensors has no tensor 'head', but {sharded / INDEX} places it there" in message
    del files["layers.10.w"]
    write_index(sharded, files)
    message = refusal(ValueError, lambda: CheckpointReader(sharded).shape("layers.2.w"))
    assert f"first.safetensors has a tensor 'layers.10.w' that {sharded / INDEX} does not list" in message


def test_config_is_an_object_of_bounded_size_or_absent(sharded):
    assert CheckpointReader(sharded).config == {}
    config = sharded / "config.json"
    for text, words in (("[1]", "[1]; it must be a JSON object"), ("{", "JSON")):
        config.write_text(text)
        assert words in (message := refusal(ValueError, lambda: CheckpointReader(sharded).config))
        assert str(config) in message
    with open(config, "wb") as file:
        file.truncate(64_000_001)
    assert f"{config} has 64000001 bytes; at most 64000000" in refusal(ValueError, lambda: CheckpointReader(sharded).config)


def test_side_files_are_the_small_ones_of_this_folder(sharded, tmp_path):
    wanted = ["LICENSE.txt", "generation_config.json", "inside.txt", "merges.txt", "spiece.model", "template.jinja", "tokenizer.vocab"]
    unwanted = ["config.json", INDEX, "tokenizer.bin", "tokenizer.safetensors", "README.md", "a.py"]
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (sharded / "inside.txt").symlink_to("merges.txt")
    (sharded / "outside.txt").symlink_to(secret)
    (sharded / "broken.txt").symlink_to("nowhere")
    (sharded / "folder.txt").mkdir()
    with open(sharded / "huge.txt", "wb") as file:
        file.truncate(64_000_001)
    for name in wanted + unwanted:
        if not (sharded / name).exists():
            (sharded / name).write_text("{}")
    assert [path.name for path in CheckpointReader(sharded).side_files()] == wanted
    assert CheckpointReader(sharded / "second.safetensors").side_files() == [sharded / name for name in wanted]


def test_a_snapshot_of_the_hub_cache_links_to_its_own_blobs(tmp_path):
    snapshot, blobs, elsewhere = tmp_path / "repo/snapshots/abc", tmp_path / "repo/blobs", tmp_path / "other/blobs"
    for folder in (snapshot, blobs, elsewhere):
        folder.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (elsewhere / "2").write_text("{}")
    safetensors.numpy.save_file({"a": np.ones(1)}, blobs / "3")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/1")
    (snapshot / "vocab.json").symlink_to("../../../other/blobs/2")
    (snapshot / "model.safetensors").symlink_to("../../blobs/3")
    reader = CheckpointReader(snapshot)
    assert reader.names == ("a",)
    assert reader.side_files() == [snapshot / "tokenizer.json"]
