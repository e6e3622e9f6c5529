"""A checkpoint folder to write: built beside its final place and renamed when it is whole."""

import errno
import json
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from numpy.typing import ArrayLike

from .safetensors import checked_tensor, new_file, shown, write_file, writing
from .stored_tensor import StoredTensor


class CheckpointWriter:
    """Write a checkpoint folder that appears whole or not at all::

        with CheckpointWriter("out") as writer:
            writer.add("lm_head.weight", weight)
            writer.write_json("config.json", config)

    Everything goes to a hidden folder ``.out.partial-*`` beside ``out``, or to ``build_in``, which is synced and renamed when the block ends, and removed
    when it raises. One shard becomes ``model.safetensors``; more become ``model-00001-of-0000N.safetensors`` and an index.

    Parameters
    ----------
    path : folder that does not exist, in one that does.
    max_shard_bytes : tensor data per shard, and so the memory that is held; a larger tensor gets a shard of its own.

    Raises
    ------
    FileExistsError : something is at ``path``, now or when the block ends; it is never overwritten.
    FileNotFoundError, NotADirectoryError, PermissionError : the parent is missing, no folder, or not writable.
    OSError : a write failed, as by ENOSPC; the message names the file.
    ValueError : a limit, tensor or name that makes no sense; no tensor at all.
    """

    def __init__(self, path: str | os.PathLike[str], max_shard_bytes: int = 5_000_000_000, build_in: Path | None = None) -> None:
        self.path = Path(path).absolute()
        if max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes is {max_shard_bytes}; a shard needs at least 1 byte")
        self._max_shard_bytes = max_shard_bytes
        refuse_existing(self.path)
        parent = self.path.parent
        if not parent.exists():
            raise FileNotFoundError(f"{self.path} cannot be made: the folder {parent} does not exist")
        if not parent.is_dir():
            raise NotADirectoryError(f"{self.path} cannot be made: {parent} is not a folder")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(f"{self.path} cannot be made: the folder {parent} is not writable")
        self._partial = build_in or self.path.with_name(f".{self.path.name}.partial-{secrets.token_hex(4)}")
        self._build_in = build_in is not None
        self._in_block = False
        self._pending: dict[str, StoredTensor] = {}  # the shard that is not written yet
        self._pending_bytes = 0
        self._shards: list[list[str]] = []  # names of the tensors of each written shard
        self._names: set[str] = set()
        self._total_bytes = 0

    def __enter__(self) -> Self:
        with writing(self._partial):
            self._partial.mkdir(exist_ok=self._build_in)  # not tempfile.mkdtemp, which makes the folder 0700 whatever the umask says
        self._in_block = True
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._in_block = False
        try:
            if exc_type is None:
                self._finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)  # after the rename there is nothing at the temporary name

    def expect(self, nbytes: int) -> None:
        """Refuse now, with OSError(ENOSPC), what will not fit: fewer than ``nbytes`` are free where the folder will be."""
        free_bytes = shutil.disk_usage(self.path.parent).free
        if free_bytes < nbytes:
            raise OSError(errno.ENOSPC, f"{self.path} needs {nbytes} bytes, but its filesystem has only {free_bytes} free")

    def add(self, name: str, tensor: ArrayLike | StoredTensor) -> None:
        """Add a StoredTensor or an array. It is not copied: leave it as it is until the block ends."""
        self._require_block()
        stored = checked_tensor(name, tensor, self.path)
        if name in self._names:
            raise ValueError(f"tensor {shown(name)} was added to {self.path} before; names must differ")
        if self._pending and self._pending_bytes + stored.nbytes > self._max_shard_bytes:
            self._write_shard()
        self._pending[name] = stored
        self._pending_bytes += stored.nbytes
        self._names.add(name)
        self._total_bytes += stored.nbytes

    def write_text(self, name: str, text: str) -> None:
        """Write a file beside the weights, in UTF-8 with the line ends of ``text``."""
        self._write_side_file(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write ``value`` as indented JSON."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy(self, file: str | os.PathLike[str]) -> None:
        """Copy a small file under its own name, its content alone: the permissions follow the umask."""
        file = Path(file)
        self._write_side_file(file.name, file.read_bytes())

    def _write_side_file(self, name: str, content: bytes) -> None:
        self._require_block()
        if Path(name).name != name or name in ("", ".."):
            raise ValueError(f"{shown(name)} is not the name of a file in {self.path}; give a name without any folder")
        if name.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"{shown(name)} is a name for weights in {self.path}; tensors go there by add()")
        with new_file(self._partial / name) as file:
            file.write(content)

    def _write_shard(self) -> None:
        write_file(self._partial / _unnumbered(len(self._shards)), self._pending)
        self._shards.append(list(self._pending))
        self._pending.clear()
        self._pending_bytes = 0

    def _finish(self) -> None:
        if not self._names:
            raise ValueError(f"no tensor was added to {self.path}; a checkpoint needs at least one")
        self._write_shard()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            shard_name = f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            os.rename(self._partial / _unnumbered(i), self._partial / shard_name)
            weight_map.update(dict.fromkeys(names, shard_name))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            with new_file(self._partial / "model.safetensors.index.json") as file:
                file.write((json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
        publish(self._partial, self.path)

    def _require_block(self) -> None:
        if not self._in_block:
            raise RuntimeError(f"the writer of {self.path} is used outside its with block, where nothing would be written")


def _unnumbered(i: int) -> str:
    """Name of shard ``i`` until it is known how many there are."""
    return f"shard-{i}.safetensors"


def refuse_existing(path: Path) -> None:
    """FileExistsError where anything is at ``path``."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists already and is not overwritten; give another path or remove it")


def publish(building: Path, path: Path) -> None:
    """Give a folder that is whole its name, all of it on the disk; FileExistsError where that is taken."""
    sync_folder(building)
    refuse_existing(path)  # rename() would replace an empty folder that somebody made meanwhile; everything else it refuses by itself
    with writing(path):
        os.rename(building, path)
    sync_folder(path.absolute().parent)


def sync_folder(path: Path) -> None:
    """Put a folder's entries on the disk, as fsync of a file does with its content."""
    with writing(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
