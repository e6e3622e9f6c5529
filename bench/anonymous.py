"""The anonymous memory of this process, sampled: what work takes, without mapped files, whose pages the system takes back when it wants them. Linux."""

import threading
import time
from pathlib import Path


class Peak:
    """Watches from its making on; ``above`` is how many bytes more than then there were at most."""

    def __init__(self) -> None:
        self._before = self._most = _anonymous()
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def above(self) -> int:
        """Bytes, as far as sampling every half a millisecond sees."""
        return self._most - self._before

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, _anonymous())
            time.sleep(0.0005)


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
