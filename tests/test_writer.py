"""CheckpointWriter: its folders as the safetensors library reads them, and what is left when it fails."""

import errno
import json
import os
import resource
import stat

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from mrgptq.checkpoint.reader import CheckpointReader
from mrgptq.checkpoint.stored_tensor import StoredTensor
from mrgptq.checkpoint.writer import CheckpointWriter

INDEX = "model.safetensors.index.json"


def test_one_shard_is_what_the_library_loads(tmp_path):
    scale = np.array([[0.5, 448]], ml_dtypes.float8_e4m3fn)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("w", np.arange(6, dtype=np.uint8).reshape(2, 3).T)
        writer.add("scale", scale)
        writer.add("norm", StoredTensor.from_bits("BF16", np.array([0x3F80, 0x4000], np.uint16)))
        writer.write_json("config.json", {"name": "ü", "size": 1})
        writer.write_text("notes.txt", "één\r\n")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "notes.txt"]
    tensors = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert tensors["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensors["scale"].dtype == torch.float8_e4m3fn and tensors["scale"].float().tolist() == [[0.5, 448]]
    assert tensors["norm"].dtype == torch.bfloat16 and tensors["norm"].tolist() == [1, 2]
    with safetensors.safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "out/config.json").read_bytes()) == {"name": "ü", "size": 1}
    assert (tmp_path / "out/notes.txt").read_bytes() == "één\r\n".encode()
    assert os.listdir(tmp_path) == ["out"]


def test_shards_hold_at_most_the_limit_unless_one_tensor_exceeds_it(tmp_path):
    sizes = {"a": 60, "b": 40, "c": 1, "huge": 250, "empty": 0, "d": 99, "e": 2}
    with CheckpointWriter(tmp_path / "out", max_shard_bytes=100) as writer:
        for name, size in sizes.items():
            writer.add(name, np.full(size, ord(name[0]), np.uint8))
    index = json.loads((tmp_path / "out" / INDEX).read_bytes())
    held = {}
    for shard in sorted(set(index["weight_map"].values())):
        for name, tensor in safetensors.torch.load_file(tmp_path / "out" / shard).items():
            assert index["weight_map"][name] == shard
            assert tensor.tolist() == [ord(name[0])] * sizes[name]
            held.setdefault(shard, set()).add(name)
    assert list(held) == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert list(held.values()) == [{"a", "b"}, {"c"}, {"huge"}, {"empty", "d"}, {"e"}]
    assert index["metadata"] == {"total_size": 452}
    assert list(index["weight_map"]) == sorted(sizes)
    assert sorted(os.listdir(tmp_path / "out")) == [*held, INDEX]
    assert CheckpointReader(tmp_path / "out").total_bytes == 452


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for out in ("one", "two"):
        with CheckpointWriter(tmp_path / out, max_shard_bytes=8) as writer:
            for name in "bca":
                writer.add(name, np.full(1, 7.0))
    contents = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in ("one", "two")]
    assert len(contents[0]) == 4 and contents[0] == contents[1]


def test_permissions_follow_the_umask(tmp_path):
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "LICENSE").chmod(0o600)
    before = os.umask(0o027)
    try:
        with CheckpointWriter(tmp_path / "out") as writer:
            writer.add("a", np.ones(1))
            writer.copy(tmp_path / "LICENSE")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out", *(tmp_path / "out").iterdir())}
    assert modes == {"out": 0o750, "model.safetensors": 0o640, "LICENSE": 0o640}
    assert (tmp_path / "out/LICENSE").read_text() == "free"


def test_the_folder_is_built_beside_its_place_and_synced_before_it_appears(tmp_path, monkeypatch):
    synced = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.readlink(f"/proc/self/fd/{descriptor}")), fsync(descriptor)))
    monkeypatch.setattr(os, "rename", lambda old, new: (synced.append(f"rename to {new}"), rename(old, new)))
    with CheckpointWriter(tmp_path / "out") as writer:
        (partial,) = tmp_path.iterdir()
        assert partial.name.startswith(".out.partial-")
        writer.add("a", np.ones(1))
        writer.write_text("notes.txt", "")
    assert synced[0] == f"{partial}/notes.txt"
    assert synced[1].startswith(str(partial)) and synced[1].endswith(".safetensors")
    assert synced[2:] == [f"rename to {partial}/model.safetensors", str(partial), f"rename to {tmp_path / 'out'}", str(tmp_path)]


def test_a_relative_path_stays_where_it_was_meant(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with CheckpointWriter("out") as writer:
        writer.add("a", np.ones(1))
        os.chdir("elsewhere")
    assert (tmp_path / "out/model.safetensors").is_file()


def occupy(path, what):
    if what == "folder":
        path.mkdir()
    elif what == "file":
        path.write_text("mine")
    else:
        path.symlink_to("nowhere")


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_whatever_is_at_the_path_is_refused_and_kept(tmp_path, what):
    out = tmp_path / "out"
    occupy(out, what)
    inode = out.lstat().st_ino
    with pytest.raises(FileExistsError, match="out exists already and is not overwritten"):
        CheckpointWriter(out)
    assert os.listdir(tmp_path) == ["out"] and out.lstat().st_ino == inode


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_what_appears_meanwhile_is_refused_and_kept(tmp_path, what):
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match="out exists already and is not overwritten"):
        with CheckpointWriter(out) as writer:
            writer.add("a", np.ones(1))
            occupy(out, what)
            inode = out.lstat().st_ino
    assert os.listdir(tmp_path) == ["out"] and out.lstat().st_ino == inode


def test_a_parent_that_cannot_take_the_folder_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="no/out cannot be made: the folder .*no does not exist"):
        CheckpointWriter(tmp_path / "no/out")
    with pytest.raises(NotADirectoryError, match="file/out cannot be made: .*file is not a folder"):
        CheckpointWriter(tmp_path / "file/out")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # as root, access() allows everything
    with pytest.raises(PermissionError, match="out cannot be made: the folder .* is not writable"):
        CheckpointWriter(tmp_path / "out")


def test_an_exception_leaves_nothing(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            with CheckpointWriter(tmp_path / "out", max_shard_bytes=1) as writer:
                writer.add("a", np.ones(1))
                writer.add("b", np.ones(1))
                writer.write_text("notes.txt", "")
                raise error
        assert os.listdir(tmp_path) == []


def test_a_full_disk_is_reported_with_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match=r"could not write .*\.out\.partial-.*safetensors") as failure:
            with CheckpointWriter(tmp_path / "out") as writer:
                writer.add("a", np.ones(10_000))
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failure.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == []

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="could not write .*config.json: No space left") as failure:
        with CheckpointWriter(tmp_path / "out") as writer:
            writer.write_json("config.json", {})
    assert failure.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


def test_expect_refuses_what_will_not_fit(tmp_path):
    writer = CheckpointWriter(tmp_path / "out")
    writer.expect(1)
    with pytest.raises(OSError, match=rf"out needs {2**62} bytes, but its filesystem has only \d+ free") as failure:
        writer.expect(2**62)
    assert failure.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda w: [w.add("a", np.ones(1)), w.add("a", np.ones(1))], ["'a' was added", "before"]),
        (lambda w: w.add("a", np.ones(1, object)), ["tensor 'a'", "dtype object"]),
        (lambda w: w.add("__metadata__", np.ones(1)), ["name '__metadata__'"]),
        (lambda w: None, ["no tensor was added"]),
        (lambda w: w.write_text("sub/notes.txt", ""), ["'sub/notes.txt'", "without any folder"]),
        (lambda w: w.write_text("..", ""), ["'..'", "without any folder"]),
        (lambda w: w.write_text("", ""), ["''", "without any folder"]),
        (lambda w: w.write_text("x.safetensors", ""), ["'x.safetensors'", "add()"]),
        (lambda w: w.write_json(INDEX, {}), [INDEX, "add()"]),
        (lambda w: [w.add("a" * 10**6, np.ones(1)), w.add("a" * 10**6, np.ones(1))], ["aaa...aaa", "before"]),
    ],
)
def test_refusals_leave_nothing(tmp_path, use, words):
    with pytest.raises(ValueError) as refusal:
        with CheckpointWriter(tmp_path / "out") as writer:
            use(writer)
    assert all(word in str(refusal.value) for word in words) and len(str(refusal.value)) < 500, refusal.value
    assert os.listdir(tmp_path) == []


def test_a_file_is_written_once(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileExistsError, match="notes.txt exists already"):
        with CheckpointWriter(tmp_path / "out") as writer:
            writer.write_text("notes.txt", "")
            writer.copy(tmp_path / "notes.txt")


def test_a_writer_needs_a_limit_and_a_block(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        CheckpointWriter(tmp_path / "out", max_shard_bytes=0)
    writer = CheckpointWriter(tmp_path / "out")
    for use in (lambda: writer.add("a", np.ones(1)), lambda: writer.write_text("notes.txt", "")):
        with pytest.raises(RuntimeError, match="out is used outside its with block"):
            use()
    with writer:
        writer.add("a", np.ones(1))
    with pytest.raises(RuntimeError, match="out is used outside its with block"):
        writer.add("b", np.ones(1))
    assert list(safetensors.torch.load_file(tmp_path / "out/model.safetensors")) == ["a"]
