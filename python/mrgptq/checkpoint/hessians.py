"""Hessians on disk: a folder with a file for each input that layers share, so that a model is calibrated today, or on several machines, and quantised later."""

import fcntl
import filecmp
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import located
from ..gptq import Hessian
from .reader import read_json_object, refuse_outside
from .safetensors import SafetensorsFile, new_file, shown, write_file, writing
from .writer import publish, refuse_existing

INDEX_NAME = "hessians.json"


class StoredHessians(Mapping[str, Hessian]):
    """{module: Hessian} of a folder that :func:`save_hessians` wrote. Each is read when it is asked for, anew each time.

    Links that lead out of the folder are not followed.

    Raises
    ------
    FileNotFoundError : no such folder, or a file of it is missing. ValueError : what is not of that form or lies elsewhere, by file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.index = index = self.path / INDEX_NAME
        if not index.is_file():
            raise FileNotFoundError(f"{path} holds no Hessians: there is no {INDEX_NAME} in it")
        refuse_outside(index, self.path)
        files = read_json_object(index).get("hessians")
        if not isinstance(files, dict) or not files:
            raise ValueError(f"{index} has hessians {short_repr(files)}; it must be an object that maps modules to file names")
        for module, name in files.items():
            if not isinstance(name, str) or set(name) & set("/\\:\0") or not name.endswith(".safetensors"):
                raise ValueError(f"{index} places {shown(module)} in {short_repr(name)}; it must be the name of a safetensors file beside it")
            if not os.path.isfile(self.path / name):  # Path.is_file raises for a name that is too long
                raise FileNotFoundError(f"{index} places {shown(module)} in {shown(name)}, but {path} has no such file")
            refuse_outside(self.path / name, self.path)
        self._files: dict[str, str] = files

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Modules that share a Hessian, in the order of the first of each."""
        groups: dict[str, list[str]] = {}
        for module, name in self._files.items():
            groups.setdefault(name, []).append(module)
        return [tuple(group) for group in groups.values()]

    def file(self, module: str) -> Path:
        """Where a module's Hessian lies."""
        return self.path / self._files[module]

    def cols(self, module: str) -> int:
        """Number of columns, from the file's header."""
        return stored_cols(self.file(module))

    def same(self, module: str, other: str) -> bool:
        """Whether two modules have one Hessian, in one file or in two that are equal."""
        a, b = self.file(module), self.file(other)
        return a == b or filecmp.cmp(a, b, shallow=False)

    def __getitem__(self, module: str) -> Hessian:
        return hessian_of(SafetensorsFile(self.file(module)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"StoredHessians({self.path}, {len(self)} modules, {len(self.groups)} inputs)"


def save_hessians(path: str | os.PathLike[str], hessians: Mapping[str, Hessian]) -> None:
    """Write running second moments to a folder, which appears whole or not at all.

    Parameters
    ----------
    path : a folder that does not exist yet. hessians : {module: Hessian}; what modules share is stored once.

    Raises
    ------
    FileExistsError : something is there. OSError : a write failed, with the file's name. ValueError : no Hessian at all. TypeError : another kind of value, by module.
    """
    groups: dict[int, list[str]] = {}
    for module, hessian in hessians.items():
        if not isinstance(module, str):
            raise TypeError(f"hessians has the key {module!r}; keys are names of modules")
        if not isinstance(hessian, Hessian):
            raise TypeError(f"{module} has a {type(hessian).__name__}; only a Hessian knows how many tokens it saw")
        groups.setdefault(id(hessian), []).append(module)
    write_groups(path, ((tuple(group), hessians[group[0]]) for group in groups.values()))


def load_hessians(path: str | os.PathLike[str]) -> StoredHessians:
    """Open a folder of :func:`save_hessians`: a mapping {module: Hessian} that reads each when it is asked for."""
    return StoredHessians(path)


def merge_hessians(path: str | os.PathLike[str], folders: Sequence[str | os.PathLike[str]], *, threads: int | None = None) -> None:
    """Write the Hessians of all tokens that several folders' saw, as after ``Hessian.merge`` in the order of the folders; one Hessian and its sum are held at a time.

    Raises ValueError where the folders hold other modules, or modules of other widths, by name, and what :func:`save_hessians` raises.
    """
    if isinstance(folders, (str, os.PathLike)):
        raise TypeError(f"folders is {os.fspath(folders)!r}; it must be a list of folders")
    if not folders:
        raise ValueError("folders is empty; there is nothing to merge")
    stored = [StoredHessians(folder) for folder in folders]
    for other in stored[1:]:
        if other.groups != stored[0].groups:
            apart = sorted(set(stored[0]) ^ set(other))
            what = f"{apart[0]} is in one alone" if apart else "modules share other inputs"
            raise ValueError(f"{stored[0].path} and {other.path} are not of one model: {what}")

    def merged() -> Iterator[tuple[tuple[str, ...], Hessian]]:
        for group in stored[0].groups:
            total = stored[0][group[0]]
            for other in stored[1:]:
                with located(f"{group[0]} of {other.path}"):
                    total.merge(other[group[0]], threads=threads)
            yield group, total

    write_groups(path, merged())


def check_new(path: Path) -> None:
    """Refuse what cannot become a folder of Hessians: before a text has passed through a model for it."""
    path = path.absolute()
    refuse_existing(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be made: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be made: the folder {path.parent} is not writable")


def stored_cols(path: Path) -> int:
    """Number of columns of a stored Hessian, from its header; ValueError names the file where it is none."""
    file = SafetensorsFile(path)
    _check(file, "")
    return file.shape("panel")[1]


def hessian_tensors(hessian: Hessian) -> dict[str, NDArray[Any]]:
    """What is stored of a Hessian: the triangle of its sum, the panel under way and the number of tokens."""
    triangle, panel, tokens = hessian.state()
    return {"triangle": triangle, "panel": panel, "tokens": np.array([tokens], dtype=np.int64)}


def hessian_of(file: SafetensorsFile, prefix: str = "") -> Hessian:
    """The Hessian that :func:`hessian_tensors` took apart, its names behind a prefix; ValueError names the file."""
    _check(file, prefix)
    with located(str(file.path)):
        return Hessian.from_state(file.tensor(f"{prefix}triangle").bits, file.tensor(f"{prefix}panel").bits, int(file.tensor(f"{prefix}tokens").bits[0]))


def _check(file: SafetensorsFile, prefix: str) -> None:
    """Refuse what is not of the form of a stored Hessian."""
    for name, dtype, rank in (("triangle", "F64", 1), ("panel", "F32", 2), ("tokens", "I64", 1)):
        if (found := (file.dtype(prefix + name), len(file.shape(prefix + name)))) != (dtype, rank):
            raise ValueError(f"{file.path}: {prefix}{name} is {found[0]} of rank {found[1]}; a Hessian's is {dtype} of rank {rank}")
    if file.shape(f"{prefix}tokens") != (1,):
        raise ValueError(f"{file.path}: {prefix}tokens has shape {file.shape(f'{prefix}tokens')}; it must be one number")


def write_groups(path: str | os.PathLike[str], groups: Iterable[tuple[tuple[str, ...], Hessian]]) -> None:
    """Write (modules that share an input, Hessian of it) as they come to a folder of :func:`save_hessians`; raises what that does."""
    path = Path(path).absolute()
    check_new(path)
    with _folder_to_build(path) as building:
        files: dict[str, str] = {}
        for number, (group, hessian) in enumerate(groups):
            name = f"{number:05d}.safetensors"
            write_file(building / name, hessian_tensors(hessian))
            files |= dict.fromkeys(group, name)
        if not files:
            raise ValueError(f"there is no Hessian to write to {path}")
        write_index(building, files)
        publish(building, path)


def write_index(folder: Path, files: Mapping[str, str]) -> None:
    """Say in which file of a folder each module's Hessian lies; one that is there already is replaced."""
    (folder / INDEX_NAME).unlink(missing_ok=True)
    with new_file(folder / INDEX_NAME) as file:
        file.write((json.dumps({"hessians": dict(files)}, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def _folder_to_build(path: Path) -> Iterator[Path]:
    """A hidden folder beside ``path``, locked, and gone when the block ends. Those that processes left that were killed go first: nobody holds their locks."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.hessians-*"):
        with _locked(left) as dead:
            if dead:
                shutil.rmtree(left, ignore_errors=True)
    building = path.with_name(f".{path.name}.hessians-{secrets.token_hex(4)}")
    with writing(building):
        building.mkdir()
    try:
        with _locked(building):
            yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock as long as the block lasts; False where another process does, or the filesystem has none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone meanwhile, or no folder
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)
