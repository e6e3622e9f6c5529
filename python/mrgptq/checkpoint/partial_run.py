"""What a run leaves when it is cut short and goes on from: a hidden folder beside its output, with a manifest of what the run is and a file for each part that is done."""

import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Self

from numpy.typing import ArrayLike

from ..display import sentence
from .reader import read_json_object
from .safetensors import new_file, write_file, writing
from .stored_tensor import StoredTensor
from .writer import refuse_existing, sync_folder

_log = logging.getLogger("mrgptq")

_MANIFEST = "manifest.json"
_ASSEMBLING = "assembling.json"  # its name from when all parts are done: what then lies at OUT is the run's own
_LOCK = "lock"
_BUILDING = "result"
_BUILT = "result.json"  # which folder it is, for it keeps its inode when it gets OUT's name
_SCRATCH = ".scratch"


class PartialRun:
    """The folder ``.OUT.partial`` of a run to OUT, begun or gone on with::

        with PartialRun(out, lambda: {"recipe": recipe.as_dict(), ...}) as run:
            if not run.has("00007"):
                write_part(run.part("00007"), tensors)

    A part has its name only once it lies on the disk whole, so what has a name is done, whenever the process was killed. When the block ends, the folder is removed; where it raises, the folder is
    kept for the next run if a part is in it, and the exception gets a note of that and of whether the same command goes on from there. One process at a time works on it; its workers may be others, which write parts alone.

    Parameters
    ----------
    out : where the result will be. identity : gives {what: JSON value}, all that the parts depend on, as it is when it is called.

    Raises
    ------
    ValueError : the folder there was begun by a run of another identity; the first difference is named. BlockingIOError : another process is at it. OSError : it cannot be made or written.
    """

    def __init__(self, out: Path, identity: Callable[[], Mapping[str, Any]]) -> None:
        self.out = out.absolute()
        self.folder = folder_of(self.out)
        self.resumed = False
        self._identity_now = lambda: json.loads(json.dumps(identity()))  # as it will be read
        self._identity = self._identity_now()

    def __enter__(self) -> Self:
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"{self.folder} is no folder; a run to {self.out.name} keeps there what is done: move it away")
        _refuse_links(self.folder)
        try:
            self._lock = _locked(self.folder, self.out, make=True)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                self._remove_if_empty()
            raise
        try:
            manifest = self.folder / _MANIFEST
            begun = [path for path in (manifest, self.folder / _ASSEMBLING) if path.is_file()]
            if begun:
                self._compare(read_json_object(begun[0]))
                self.resumed = True
            else:
                _clear(self.folder)  # what has no manifest is what somebody began to remove
                with new_file(temporary(manifest)) as file:
                    file.write((json.dumps(self._identity, indent=1, ensure_ascii=False) + "\n").encode())
                    name = file.name
                os.replace(name, manifest)
                sync_folder(self.folder)
                sync_folder(self.folder.parent)
            self._sweep("*.tmp-*")
            self._sweep(f"{_BUILDING}/*.tmp-*")
            self._sweep(f"*{_SCRATCH}")
            if not is_finished(self.out):
                refuse_existing(self.out)  # as what another run wrote since this one was planned
        except BaseException:
            self._remove_if_empty()
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is None:
            # As long as both marks of that are here, the next run knows that what lies at OUT is this run's; all else goes before the first of them.
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name not in (_ASSEMBLING, _BUILT, _LOCK):
                    path.unlink(missing_ok=True)
            (self.folder / _ASSEMBLING).unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._sweep(f"*{_SCRATCH}")
            self._remove_if_empty()
            if not is_finished(self.out):  # what is at OUT later may have the inode that the result had
                (self.folder / _BUILT).unlink(missing_ok=True)
            if self.folder.is_dir():
                error.add_note(f"what is done is kept in {self.folder}{self._prospect(error)}")
        self._lock.close()

    def part(self, name: str) -> Path:
        """Where a part is or will be."""
        return self.folder / f"{name}.safetensors"

    def scratch(self, name: str) -> Path:
        """A new place for a file that this run alone needs, for its workers: no other goes on from it, and tasks of an earlier one that are still at work do not take it for theirs."""
        return self.folder / f"{name}-{secrets.token_hex(4)}{_SCRATCH}"

    def result(self) -> Path:
        """The folder that the result is made in. Where parts are files of it as they are, they may be written there at once; :meth:`assemble` must be told."""
        building = self.folder / _BUILDING
        building.mkdir(exist_ok=True)
        return building

    def has(self, name: str) -> bool:
        """Whether it is done."""
        return self.part(name).is_file()

    def assemble(self, keep: Iterable[Path], *, begun: bool = False) -> Path:
        """All parts are done, and those to ``keep`` are all that is needed of them: the folder to make the result in, which then gets its name; empty, or where the result was ``begun`` in :meth:`result` with those of its files.

        Raises ValueError where what the run depends on has changed since it began: parts may be of the one and of the other.
        """
        if difference := first_difference(self._identity, self._identity_now()):
            what, was, now = difference
            raise ValueError(f"{what} has changed from {was} to {now} while the run was at work; its layers may be of either")
        keep = set(keep)
        building = self.result()
        _clear(building, keep)
        unfinished = temporary(self.folder / _BUILT)
        with new_file(unfinished) as file:
            file.write(json.dumps(_place(building)).encode())
        os.replace(unfinished, self.folder / _BUILT)
        if (self.folder / _MANIFEST).is_file():
            os.replace(self.folder / _MANIFEST, self.folder / _ASSEMBLING)
        sync_folder(self.folder)
        for path in set(self.folder.glob("*.safetensors")) - keep:
            path.unlink()
        return building

    def bytes_there(self) -> tuple[int, int]:
        """What lies on the disk: parts beside the result, and what there is of that."""
        parts, result = (sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) for folder in (self.folder, self.folder / _BUILDING))
        return parts, result

    def _compare(self, begun: dict[str, Any]) -> None:
        difference = first_difference(begun, self._identity)
        if difference:
            what, was, now = difference
            raise ValueError(f"{self.folder} was begun by a run with {what} {was}; this one has {now}. Give the same command to go on, or remove that folder to begin anew")

    def _prospect(self, error: BaseException) -> str:
        """What becomes of the parts: where an input has changed, or was refused for what it is, the same command does not go on."""
        try:
            difference = first_difference(self._identity, self._identity_now())
        except (OSError, ValueError) as unreadable:
            return f", but the run's inputs cannot be read any more ({sentence(unreadable)}): remove that folder to begin anew"
        if difference:
            what, was, now = difference
            return f", but meanwhile {what} has changed from {was} to {now}: remove that folder to begin anew"
        return "; remove that folder to begin anew" if isinstance(error, (ValueError, TypeError)) else ": the same command goes on from there"

    def _sweep(self, pattern: str) -> None:
        for left in self.folder.glob(pattern):
            _remove(left)

    def _remove_if_empty(self) -> None:
        """Unless it is a mark of what lies at OUT."""
        if not any(self.folder.rglob("*.safetensors")) and not is_finished(self.out):
            shutil.rmtree(self.folder, ignore_errors=True)


def folder_of(out: Path) -> Path:
    """Where a run to ``out`` keeps its parts."""
    return out.with_name(f".{out.name}.partial")


def is_finished(out: Path, sign: str = "") -> bool:
    """Whether ``out`` was written whole by a run that was cut short before it could say so: it has the place on the disk of the folder that the run had built, and in it a file ``sign``, for a later folder may get the place of one that is gone."""
    if not out.is_dir() or not (out / sign).exists() or not out.absolute().name:
        return False
    folder = folder_of(out.absolute())
    if folder.is_symlink() or not all((folder / name).is_file() for name in (_ASSEMBLING, _BUILT)) or (folder / _BUILDING).exists():
        return False
    return read_json_object(folder / _BUILT) == _place(out)


def discard(out: Path) -> None:
    """Throw away what a run to ``out`` left unfinished; BlockingIOError where one is at work."""
    out = out.absolute()
    folder = folder_of(out)
    if not folder.is_dir():
        return
    _refuse_links(folder)
    with _locked(folder, out):
        for name in (_MANIFEST, _ASSEMBLING):  # first: without them the rest is nobody's, wherever this is cut short
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _place(folder: Path) -> dict[str, int]:
    status = folder.stat()
    return {"device": status.st_dev, "inode": status.st_ino}


def _refuse_links(folder: Path) -> None:
    """ValueError for what leads out of the folder: a run would write, or clear, what lies there, or publish it."""
    inside = [path for each in (folder, folder / _BUILDING) if each.is_dir() and not each.is_symlink() for path in each.iterdir()]
    for path in (folder, *inside):
        if path.is_symlink():
            raise ValueError(f"{path} is a link; a run keeps what is done in a folder and files of its own: remove it")


def _clear(folder: Path, keep: Iterable[Path] = ()) -> None:
    """Remove what is in a folder, but for its lock and what is to be kept."""
    for path in set(folder.iterdir()) - {folder / _LOCK, *keep}:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _locked(folder: Path, out: Path, *, make: bool = False) -> FileIO:
    """The folder's lock, held until it is closed; with ``make`` the folder too. BlockingIOError where another process holds it."""
    while True:
        with writing(folder):
            if make:
                folder.mkdir(exist_ok=True)
            # Not truncated, nor waited for: whatever somebody put there is left as it is.
            lock = open(folder / _LOCK, "r+b", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666))
        try:
            if not stat.S_ISREG(os.fstat(lock.fileno()).st_mode):
                raise ValueError(f"{folder / _LOCK} is no ordinary file, as a run's lock is: remove it")
            _take(lock, out)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / _LOCK)):
                    return lock
        except BaseException:
            lock.close()
            raise
        lock.close()  # who held it has removed it meanwhile, and another may have made it anew


def _take(lock: FileIO, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"another process is writing {out}: it holds {folder_of(out) / _LOCK}") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _log.warning("the filesystem of %s has no locks (%s): nothing but you keeps a second run from writing %s at once", folder_of(out), error.strerror, out)


def temporary(path: Path) -> Path:
    """A name beside ``path`` that no other process takes."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def write_part(path: Path, tensors: Mapping[str, ArrayLike | StoredTensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file under a name that it only has when it lies on the disk whole; one that is there already is replaced."""
    unfinished = temporary(path)
    write_file(unfinished, tensors, metadata)
    try:
        with writing(path):
            os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def first_difference(a: Any, b: Any, where: str = "") -> tuple[str, str, str] | None:
    """(place, value in a, value in b) of the first difference of two JSON values, in the order of b; None where there is none."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*b, *(key for key in a if key not in b)]:
            if found := first_difference(a.get(key), b.get(key), f"{where}.{key}" if where else key):
                return found
        return None
    return None if a == b else (where, json.dumps(a, ensure_ascii=False), json.dumps(b, ensure_ascii=False))
