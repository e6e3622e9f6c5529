"""One safetensors file: read it without a copy, write it in one pass.

Layout: 8 bytes header length (little-endian), a JSON object, the data. The object maps each tensor's name to its dtype,
shape and [begin, end) in the data, and "__metadata__" to an object of strings. The tensors cover the data without gap or
overlap. Source: https://github.com/huggingface/safetensors, README and safetensors/src/tensor.rs.
"""

import difflib
import heapq
import json
import math
import mmap
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr
from reprlib import repr as short_repr
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .stored_tensor import BITS_DTYPE, StoredTensor, bits_shape

__all__ = ["SafetensorsFile", "StoredTensor", "checked_tensor", "new_file", "open_file", "parse_json_object", "shown", "unknown_tensor", "write_file", "writing"]

_MAX_HEADER_BYTES = 100_000_000  # the library's limit
_MAX_AXES = 32  # NumPy's limit before 2.0
_METADATA = "__metadata__"
_MOST_COMPARED = 10_000  # names for a hint, which take a third of a second
_NAMES = Repr()
_NAMES.maxstring = 200  # a header may call a tensor by a hundred megabytes


class _Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin_bytes: int  # from the start of the data
    end_bytes: int


def shown(name: object) -> str:
    """A name out of a file as messages say it: quoted, control characters escaped, of a very long one the ends."""
    return _NAMES.repr(name)


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading; ValueError for a pipe or a device, which would be waited for or never end."""
    # Without O_NONBLOCK the opening of a pipe waits for a writer. Asked of the open descriptor, for what lies at the path may change meanwhile.
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise OSError(error.errno, f"could not read {os.fspath(path)}: {error.strerror}") from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise ValueError(f"{os.fspath(path)} is {names.get(kind, 'no regular file')}; only a regular file is read")
    return os.fdopen(descriptor, "rb")


class SafetensorsFile:
    """A safetensors file, memory-mapped read-only; its header is checked completely when it is opened.

    There is nothing to close: the map lives as long as this object or any array that came from it. Leave the file as it is meanwhile: removing it is harmless, but whoever reads what was cut off is
    killed by the system (SIGBUS). A file that has shrunk already is refused when a tensor is asked for.

    Attributes
    ----------
    path : pathlib.Path.
    names : tuple of str, in the order of the data.
    metadata : dict of str to str.

    Raises
    ------
    FileNotFoundError : no such file.
    ValueError : not a whole, well-formed safetensors file; one sentence with the file, the tensor, what it has and what is allowed.
        Asking for a tensor that is not there is a ValueError too, and lists near names.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with open_file(self.path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            if file_bytes < 8:
                raise ValueError(f"{path} has {file_bytes} bytes; a safetensors file has at least 8, so it is empty or truncated")
            self._map = mmap.mmap(file.fileno(), file_bytes, access=mmap.ACCESS_READ)
        mapped = np.frombuffer(self._map, np.uint8)
        header_bytes = int.from_bytes(mapped[:8].tobytes(), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(
                f"{path} announces a header of {header_bytes} bytes; at most {_MAX_HEADER_BYTES} are allowed, "
                "so it is damaged or not a safetensors file"
            )
        if header_bytes > file_bytes - 8:
            raise ValueError(
                f"{path} announces a header of {header_bytes} bytes, but only {file_bytes - 8} follow: "
                "it is truncated or not a safetensors file"
            )
        header = parse_json_object(mapped[8 : 8 + header_bytes].tobytes(), f"the header of {path}", strict=True)
        self._data = mapped[8 + header_bytes :]
        self.metadata: dict[str, str] = header.pop(_METADATA, {})
        if not _is_text_to_text(self.metadata):
            raise ValueError(f"the header of {path} has {_METADATA} {short_repr(self.metadata)}; it must map strings to strings")
        self._entries = _parse_entries(header, self._data.size, path)
        self.names = tuple(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def dtype(self, name: str) -> str:
        """The safetensors dtype name, such as "BF16"."""
        return self._entry(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Elements per axis."""
        return self._entry(name).shape

    def nbytes(self, name: str) -> int:
        """Size of the tensor's data."""
        entry = self._entry(name)
        return entry.end_bytes - entry.begin_bytes

    def tensor(self, name: str) -> StoredTensor:
        """The tensor, its bits a read-only view of the map; where the file does not align its data, neither does the view."""
        entry = self._entry(name)
        if (file_bytes := self._map.size()) < len(self._map):
            raise ValueError(f"{self.path} had {len(self._map)} bytes when it was opened and has {file_bytes} now: it was truncated meanwhile, so tensor {shown(name)} is not read")
        bits = self._data[entry.begin_bytes : entry.end_bytes].view(BITS_DTYPE[entry.dtype])
        return StoredTensor(entry.dtype, bits.reshape(bits_shape(entry.dtype, entry.shape)))

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise unknown_tensor(name, self.names, self.path)
        return self._entries[name]


def unknown_tensor(name: str, names: Collection[str], where: object) -> ValueError:
    """The ValueError to raise when ``where`` has no tensor ``name``; it lists the nearest of ``names``."""
    # Comparing takes the product of two lengths, and a file may hold a million names or a very long one.
    likely = [other for other in names if len(other) <= 200] if len(name) <= 200 else []
    if len(likely) > _MOST_COMPARED:
        likely = heapq.nlargest(_MOST_COMPARED, likely, key=lambda other: len(os.path.commonprefix((name, other))))
    near = difflib.get_close_matches(name, likely, n=3)
    hint = f"near names are {', '.join(map(repr, near))}" if near else f"none of its {len(names)} names is near"
    return ValueError(f"{where} has no tensor {shown(name)}; {hint}")


def parse_json_object(text: bytes, where: str, *, strict: bool = False) -> dict[str, Any]:
    """Parse bytes that must be one JSON object, in which (at any depth) no key occurs twice.

    Raises
    ------
    ValueError : not UTF-8, not JSON, not an object, a repeated key, with ``strict`` also NaN and Infinity, which JSON has not and the configurations of some models have; ``where`` is the subject of the sentence.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = {}
        for key, value in pairs:
            key.encode()  # Refuses an escaped lone surrogate: a str to Python, but no name that could be printed or written.
            if key in result:
                raise ValueError(f"the key {shown(key)} occurs twice in one object")
            result[key] = value
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_constant=refuse if strict else None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON in UTF-8 without repeated keys: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {short_repr(value)}; it must be a JSON object")
    if b"\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where} is not JSON in UTF-8 without repeated keys: it has a lone surrogate, which is no character") from None
    return value


def _parse_entries(header: dict[str, Any], data_bytes: int, path: object) -> dict[str, _Entry]:
    """The header's entries in the order of the data, each checked by itself and against its neighbours."""
    entries = {}
    for name, info in header.items():
        try:
            entries[name] = _parse_entry(info, data_bytes)
        except ValueError as error:
            raise ValueError(f"{path}: tensor {shown(name)} {error}") from None

    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin_bytes, item[1].end_bytes)))
    covered_bytes = 0
    last = "nothing"
    for name, entry in entries.items():
        if entry.begin_bytes != covered_bytes:
            problem = "leaves a hole" if entry.begin_bytes > covered_bytes else "overlaps it"
            raise ValueError(
                f"{path}: tensor {shown(name)} begins at byte {entry.begin_bytes} of the data and {problem}: "
                f"before it lies {last}, up to byte {covered_bytes}, and tensors must follow each other without gap or overlap"
            )
        covered_bytes = entry.end_bytes
        last = f"tensor {shown(name)}"
    if covered_bytes != data_bytes:
        raise ValueError(f"{path} has {data_bytes} bytes of data, but its tensors end at byte {covered_bytes}; nothing may follow them")
    return entries


def _parse_entry(info: Any, data_bytes: int) -> _Entry:
    """One header entry; raises ValueError with a sentence that lacks its subject, the tensor."""
    if not isinstance(info, dict) or not {"dtype", "shape", "data_offsets"} <= info.keys():
        raise ValueError(f"has the entry {short_repr(info)}; it must be an object with dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS_DTYPE:
        raise ValueError(f"has dtype {short_repr(dtype)}; the known ones are {', '.join(BITS_DTYPE)}")
    if not _is_sizes(shape) or len(shape) > _MAX_AXES:
        raise ValueError(f"has shape {short_repr(shape)}; it must be a list of at most {_MAX_AXES} integers, none negative")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"has data_offsets {short_repr(offsets)}; they must be two integers, 0 <= begin <= end")
    # NumPy multiplies the axes other than 0 even when one is 0, so an empty tensor can overflow as well.
    if math.prod(axis for axis in shape if axis) * BITS_DTYPE[dtype].itemsize >= 2**63:
        raise ValueError(f"has shape {short_repr(shape)}, whose size overflows 63 bits; no array can hold it")
    begin_bytes, end_bytes = offsets
    if end_bytes > data_bytes:
        raise ValueError(f"ends at byte {short_repr(end_bytes)} of the data, but the file has {data_bytes} bytes of data: it is truncated")
    needed_bytes = math.prod(bits_shape(dtype, shape)) * BITS_DTYPE[dtype].itemsize
    if end_bytes - begin_bytes != needed_bytes:
        raise ValueError(f"has data_offsets {offsets}, but {dtype} of shape {shape} needs {needed_bytes} bytes")
    return _Entry(dtype, tuple(shape), begin_bytes, end_bytes)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)  # bool is an int, true is no size


def _is_text_to_text(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for item in value.items() for text in item)


def checked_tensor(name: str, tensor: ArrayLike | StoredTensor, where: object) -> StoredTensor:
    """The tensor as it would be stored in ``where`` under ``name``; ValueError if the format cannot hold the one or the other."""
    if not isinstance(name, str) or name == _METADATA:
        raise ValueError(f"a tensor of {where} has the name {shown(name)}; names are strings other than {_METADATA!r}")
    try:
        return StoredTensor.of(tensor)
    except ValueError as error:
        raise ValueError(f"tensor {shown(name)} of {where}: {error}") from None


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, ArrayLike | StoredTensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a new safetensors file: the whole file reaches the disk, or none is left.

    The order is by dtype, widest first, then by name, so the bytes depend on the content alone, every tensor is aligned, and the file
    is the one the safetensors library writes (which shuffles the metadata where there are several).

    Parameters
    ----------
    path : a file that does not exist yet, or a character device.
    tensors : mapping of str to StoredTensor or array (NumPy or ml_dtypes, any strides).
    metadata : mapping of str to str, added to ``{"format": "pt"}``, without which older transformers refuse the file.

    Raises
    ------
    FileExistsError : something is there.
    OSError : the write failed, as by ENOSPC; the message names the file.
    ValueError : a tensor, name or metadata that the format cannot hold; nothing was opened.
    """
    metadata = {"format": "pt", **(metadata or {})}
    if not _is_text_to_text(metadata):
        raise ValueError(f"metadata of {path} must be strings to strings, got {short_repr(metadata)}")
    stored = {name: checked_tensor(name, tensor, path) for name, tensor in tensors.items()}

    widest_first = list(reversed(BITS_DTYPE))
    names = sorted(stored, key=lambda name: (widest_first.index(stored[name].dtype), name))
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))}
    end_bytes = 0
    for name in names:
        begin_bytes, end_bytes = end_bytes, end_bytes + stored[name].nbytes
        header[name] = {"dtype": stored[name].dtype, "shape": stored[name].shape, "data_offsets": (begin_bytes, end_bytes)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER_BYTES:
        raise ValueError(f"the header of {path} would have {len(text)} bytes; at most {_MAX_HEADER_BYTES} are allowed, so use more shards")

    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(np.ascontiguousarray(stored[name].bits).reshape(-1).view(np.uint8).data)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """An OSError of the block as that of the file or folder that it makes."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open ``path`` for binary writing; when the block ends, the whole file is on the disk, and if it fails, no file is left.

    A character device is written to and never removed. The block must only write: an OSError in it is reported as this file's.

    Raises
    ------
    FileExistsError : something other than a character device is there.
    OSError : with the errno of the failed write and a message that names the file.
    """
    path = Path(path)
    is_device = path.is_char_device()
    if not is_device and os.path.lexists(path):
        raise FileExistsError(f"{path} exists already and is not overwritten")
    with writing(path):
        file = open(path, "wb" if is_device else "xb")
        try:
            with file:
                yield file
                file.flush()
                if not is_device:
                    os.fsync(file.fileno())
        except BaseException:
            if not is_device:
                path.unlink(missing_ok=True)
            raise
