"""A checkpoint to read: a folder whose weights are one safetensors file or shards with an index; or that file or index itself."""

import os
import re
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

from .safetensors import SafetensorsFile, open_file, parse_json_object, shown, unknown_tensor
from .stored_tensor import StoredTensor

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (*_PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".npz", ".onnx")
_SIDE_FILES = ("tokenizer*", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*")
MAX_TEXT_BYTES = 64_000_000  # of config.json, the index and each side file; the largest seen are tokenizers and indices of 10 to 35 MB
_FORMS: dict[str, tuple[type, str]] = {  # of what is read of config.json
    "model_type": (str, "a name"),
    "hidden_size": (int, "a whole number from 1 on"),
    "vocab_size": (int, "a whole number from 1 on"),
    "quantization_config": (dict, "a table"),
}
_MAX_DEPTH = 100  # of objects and lists in each other; far from what Python's own recursion bears, which whoever walks through them needs


class CheckpointReader:
    """The tensors of a checkpoint by name. The index is checked at once, each shard when one of its tensors is asked for.

    In a folder, ``model.safetensors`` comes first (as in transformers), then the shards that ``model.safetensors.index.json`` names,
    then the only ``*.safetensors`` file there is. Links that lead out of the folder are not followed, whatever they are to be; only the path itself may be one, and a snapshot folder of the Hugging Face
    cache may link to the blobs of its own repository.

    Attributes
    ----------
    path : pathlib.Path, as given.
    folder : where config.json and the side files are: the path, or the folder it lies in when it is a file.
    names : tuple of str in natural order, layer 2 before layer 10.

    Raises
    ------
    FileNotFoundError : nothing at the path, no weights in the folder, or a shard that the index names is not there.
    ValueError : an index, a shard or config.json that is not of its form or lies elsewhere, or a tensor name that does not exist (near ones are listed).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._open_shards: dict[str, SafetensorsFile] = {}
        if self.path.is_dir():
            self.folder = self.path
            weights = _find_weights(self.path)
            refuse_outside(weights, self.folder)
        elif self.path.exists():
            self.folder = self.path.parent
            weights = self.path
        else:
            raise FileNotFoundError(f"there is no checkpoint at {path}, neither a folder nor a file")
        self._names_in: dict[str, list[str]] = {}  # of each shard, as the index has it
        if weights.name == _INDEX:
            self._shard_of = _read_index(weights)
            for name, shard_name in self._shard_of.items():
                self._names_in.setdefault(shard_name, []).append(name)
        else:
            self._open_shards[weights.name] = SafetensorsFile(weights)
            self._shard_of = dict.fromkeys(self._open_shards[weights.name].names, weights.name)
        self.names = tuple(sorted(self._shard_of, key=_natural_order))

    def __contains__(self, name: object) -> bool:
        return name in self._shard_of

    def dtype(self, name: str) -> str:
        """The safetensors dtype name, such as "BF16"."""
        return self._shard(name).dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Elements per axis."""
        return self._shard(name).shape(name)

    def nbytes(self, name: str) -> int:
        """Size of the tensor's data."""
        return self._shard(name).nbytes(name)

    def tensor(self, name: str) -> StoredTensor:
        """The StoredTensor, its bits a read-only view of the mapped file."""
        return self._shard(name).tensor(name)

    @cached_property
    def total_bytes(self) -> int:
        """Size of all tensors' data; opens every shard."""
        return sum(self.nbytes(name) for name in self.names)

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as a dict, empty where there is none."""
        path = self.folder / "config.json"
        return read_config(path) if os.path.lexists(path) else {}

    def files(self) -> list[Path]:
        """All that a conversion reads: config.json, the weights with their index, the side files."""
        weights = {self.folder / name for name in self._shard_of.values()}
        extra = [path for path in (self.folder / "config.json", self.folder / _INDEX) if path.is_file()]
        return sorted({*weights, *extra, *self.side_files()})

    def side_files(self) -> list[Path]:
        """The small files a user wants beside a converted checkpoint, sorted: tokenizer, generation settings, templates, licence.

        Left out: config.json, the index, weights, files above 64 MB, and links that lead out of the folder, which could carry anything into what is published.
        """
        homes = _homes(self.folder)

        def is_side_file(path: Path) -> bool:
            name = path.name
            return (
                any(fnmatchcase(name, pattern) for pattern in _SIDE_FILES)
                and name != "config.json"
                and not name.endswith((".index.json", *_WEIGHTS))
                and path.is_file()
                and any(path.resolve().is_relative_to(home) for home in homes)
                and path.stat().st_size <= MAX_TEXT_BYTES
            )

        return sorted(filter(is_side_file, self.folder.iterdir()))

    def _shard(self, name: str) -> SafetensorsFile:
        if name not in self._shard_of:
            raise unknown_tensor(name, self.names, self.path)
        shard_name = self._shard_of[name]
        if shard_name not in self._open_shards:
            self._open_shards[shard_name] = self._open(shard_name)
        return self._open_shards[shard_name]

    def _open(self, shard_name: str) -> SafetensorsFile:
        """Open a shard of the index and compare the two, so that no tensor is missing and none is dropped unseen."""
        refuse_outside(self.folder / shard_name, self.folder)
        shard = SafetensorsFile(self.folder / shard_name)
        for name in self._names_in[shard_name]:
            if name not in shard:
                raise ValueError(f"{shard.path} has no tensor {shown(name)}, but {self.folder / _INDEX} places it there")
        for name in shard.names:
            if name not in self._shard_of:
                raise ValueError(f"{shard.path} has a tensor {shown(name)} that {self.folder / _INDEX} does not list")
        return shard


def _homes(folder: Path) -> list[Path]:
    """Where the files of a checkpoint folder may lie, links resolved."""
    folder = Path(os.path.realpath(folder))
    return [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]


def refuse_outside(path: Path, folder: Path) -> None:
    """ValueError for a link that leads out of the folder it lies in: what somebody packed could make a file of this machine part of what is written from it."""
    if path.is_symlink() and not any((target := Path(os.path.realpath(path))).is_relative_to(home) for home in _homes(folder)):
        raise ValueError(f"{path} is a link to {target}, outside its folder; links that lead out of one are not followed: put the file itself there")


def _find_weights(folder: Path) -> Path:
    """The folder's safetensors file or its index."""
    for name in (_SINGLE, _INDEX):
        if (folder / name).is_file():
            return folder / name
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = short_repr([path.name for path in found])
        raise ValueError(f"{folder} has {len(found)} safetensors files, {names}, but no {_INDEX} that says which tensors are where")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise FileNotFoundError(
            f"{folder} has no safetensors file; {short_repr(pickles)} are pickles, which can run code when they are read, "
            "and are not read: convert them to safetensors first"
        )
    raise FileNotFoundError(f"{folder} has no safetensors file, neither {_SINGLE} nor {_INDEX}")


def _read_index(path: Path) -> dict[str, str]:
    """The index's map of tensor to shard, every shard a file beside the index."""
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path} has weight_map {short_repr(weight_map)}; it must be an object that maps tensors to file names")
    missing: dict[str, bool] = {}
    for name, shard_name in weight_map.items():
        if not isinstance(shard_name, str) or shard_name in ("", ".", "..") or set(shard_name) & set("/\\:\0"):
            raise ValueError(
                f"{path} places tensor {shown(name)} in {short_repr(shard_name)}; "
                "a shard is the name of a file beside the index, without any folder"
            )
        if shard_name not in missing:
            missing[shard_name] = not os.path.isfile(path.parent / shard_name)  # Path.is_file raises for a name that is too long
        if missing[shard_name]:
            raise FileNotFoundError(f"{path} places tensor {shown(name)} in {shard_name}, but {path.parent} has no such file")
    return weight_map


def read_json_object(path: Path) -> dict[str, Any]:
    """A small JSON file of a checkpoint. ValueError where it is no regular file, has more than 64 MB, more than 100 levels or is not one JSON object, by its name."""
    with open_file(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > MAX_TEXT_BYTES:
            raise ValueError(f"{path} has {size_bytes} bytes; at most {MAX_TEXT_BYTES} are read")
        value = parse_json_object(file.read(MAX_TEXT_BYTES + 1), str(path))
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for parent in level for child in (parent.values() if isinstance(parent, dict) else parent) if isinstance(child, (dict, list))]
    if level:
        raise ValueError(f"{path} has more than {_MAX_DEPTH} objects and lists inside each other")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """A model's config.json; ValueError too for a link that leads out of its folder, and for a setting that is read here and has another form."""
    refuse_outside(path, path.parent)
    config = read_json_object(path)
    for key, (kind, form) in _FORMS.items():
        value = config.get(key)
        if value is not None and (type(value) is not kind or isinstance(value, int) and value < 1):  # not isinstance, for true is an int
            raise ValueError(f"{path} has {key} {short_repr(value)}; it must be {form}")
    return config


def _natural_order(name: str) -> tuple[list[Any], str]:
    """A sort key in which runs of digits compare as numbers (as text without leading zeros, for int() refuses very long ones)."""
    parts: list[Any] = re.split("([0-9]+)", name)
    numbers = [part.lstrip("0") for part in parts[1::2]]
    parts[1::2] = [(len(number), number) for number in numbers]
    return parts, name
