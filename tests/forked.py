"""Commands in processes of their own that need not import torch and transformers first, which takes seconds: forks of one that has imported them and has done nothing else."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

SERVER = """
import json, os, runpy, sys
from mrgptq import cli, hf

for line in sys.stdin:
    arguments, folder, *streams = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        for descriptor, path in enumerate([os.devnull, *streams]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        if arguments[0] == "mrgptq":
            status = cli.main(arguments[1:])
            sys.stdout.flush()
            os._exit(status)  # the end of an interpreter that has imported torch takes longer than many a run
        sys.argv, sys.path[0] = arguments, os.path.dirname(arguments[0])
        runpy.run_path(arguments[0], run_name="__main__")
        sys.exit()
    os.write(1, b"%d\\n" % pid)
    os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


class Forks:
    """Runs ``mrgptq ARGUMENTS`` or ``SCRIPT.py ARGUMENTS``, one at a time."""

    def __init__(self, folder):
        self._streams = [folder / "stdout", folder / "stderr"]
        self._server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def run(self, *arguments, cwd, kill_after=None):
        """subprocess.CompletedProcess of it, its ``seconds`` beside; killed after so many."""
        self._server.stdin.write(json.dumps([list(map(str, arguments)), *map(str, [cwd, *self._streams])]).encode() + b"\n")
        pid, begin = int(self._server.stdout.readline()), time.perf_counter()
        if not select.select([self._server.stdout], [], [], kill_after)[0]:
            with suppress(ProcessLookupError):  # it has ended just now
                os.kill(pid, signal.SIGKILL)
        done = subprocess.CompletedProcess(arguments, int(self._server.stdout.readline()), *(path.read_text(encoding="utf-8") for path in self._streams))
        done.seconds = time.perf_counter() - begin
        return done

    def end(self):
        """Until then it waits for more."""
        self._server.kill()
        self._server.communicate()
