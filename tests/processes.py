"""Other processes, as Linux tells of them in /proc."""

from contextlib import suppress
from pathlib import Path


def _stat(pid):
    """[state, parent, ...]; [] of a process that is gone, perhaps while it was looked at."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
    return []


def is_stopped(pid):
    """Whether a process does nothing until it is told to go on."""
    return _stat(pid)[:1] == ["T"]


def is_alive(pid):
    """Whether a process has not ended; one that nobody has waited for has."""
    return _stat(pid)[:1] not in ([], ["Z"])


def children(pid):
    """Living processes whose parent that is."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _stat(path.name)[1:2] == [str(pid)] and is_alive(path.name)]
