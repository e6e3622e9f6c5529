"""A run with a text whose layers an executor quantises: the bytes of a run without one, whichever of the two goes on after the other, and nothing left of what workers read."""

import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from folders import contents
from processes import is_stopped

import mrgptq as mg
from mrgptq import cli, group, tasks
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan
from mrgptq.result import Activations

RECIPES = {
    "mr-gptq": mg.Recipe.named("mr-gptq"),
    "best": mg.Recipe.named("best"),
    "best W4A4": mg.Recipe.named("best", activations="nvfp4"),
    "rtn W4A4": mg.Recipe.named("rtn", activations="nvfp4"),
}
TEXT = {"tokens": 512, "sequence": 128}


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(scope="module")
def expected(tmp_path_factory, leaf_folder, calibration_text):
    """What runs without an executor write, by recipe."""
    folder, known = tmp_path_factory.mktemp("here"), {}

    def of(name):
        if name not in known:
            quantize_checkpoint(make_plan(leaf_folder, folder / name, RECIPES[name], **TEXT), calibration_text, threads=2)
            known[name] = contents(folder / name)
        return known[name]

    return of


@pytest.fixture
def run(leaf_folder, calibration_text, tmp_path):
    """Quantises leaf to tmp_path / "out": what is written."""

    def quantise(name, executor, **options):
        quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", RECIPES[name], **TEXT), calibration_text, threads=2, executor=executor, worker_threads=1, **options)
        return contents(tmp_path / "out")

    return quantise


@pytest.mark.parametrize("kind", ["threads", "processes"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bytes_are_those_of_a_run_without_an_executor(recipe, kind, run, processes, expected, tmp_path):
    calls = []
    with ThreadPoolExecutor(3) as threads:
        got = run(recipe, threads if kind == "threads" else processes, progress=lambda *state: calls.append(state))
    assert got == expected(recipe) and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [call for call in calls if call[0] == "quantise"] == [("quantise", i + 1, 28) for i in range(28)]


class Watched(Executor):
    """Works at once, and notes of each task how many bytes its message has, and how many lie there for it and others."""

    def __init__(self):
        self.messages, self.scratch = [], []

    def submit(self, function, task):
        self.messages.append(len(pickle.dumps(task)))
        self.scratch.append(sum(path.stat().st_size for path in task.part.parent.glob("*.scratch")))
        future = Future()
        future.set_result(function(task))
        return future


def test_tasks_carry_no_arrays_and_files_are_those_that_were_announced(leaf_folder, calibration_text, tmp_path):
    """A block's four files lie there together, each with a header in which fewer than 4096 bytes name tensors. 510 tokens leave a panel all but full; q_proj, of as many rows as the stream, might have been a writer."""
    watched = Watched()
    plan = make_plan(leaf_folder, tmp_path / "out", RECIPES["best"], tokens=510, sequence=255)
    quantize_checkpoint(plan, calibration_text, threads=2, executor=watched)
    assert len(watched.messages) == 16 and max(watched.messages) < 2000
    least = plan.moments_bytes - 8 * 128**2 - 4 * 2 * sum((3 * 128 + 384, 3 * 128 + 2 * 64 + 2 * 384))
    assert least < max(watched.scratch) < least + 4 * 4096


@pytest.mark.parametrize("cols", [3, 64])
def test_what_is_known_of_layers_comes_back_to_the_bit(cols, tmp_path):
    rng = np.random.default_rng(cols)
    hessians = [mg.Hessian(cols), mg.Hessian(5)]
    for hessian in hessians:
        hessian.update(rng.standard_normal((300, hessian.cols)))
    known = group.Moments(hessians[0], rng.standard_normal((cols, cols)), {"a.b": rng.standard_normal((5, cols))}, {"a.b": hessians[1]}, Activations("nvfp4", tensor_scale=0.1))
    for moments in (known, group.Moments(hessians[0])):
        path = tmp_path / f"{moments.cross is None}.scratch"
        tasks.write_moments(path, moments)
        back = tasks.read_moments(path)
        assert back.hessian.tokens == 300 and back.hessian.matrix.tobytes() == hessians[0].matrix.tobytes() and back.activations == moments.activations
        assert (back.cross is None) == (moments.cross is None) and back.streams.keys() == moments.streams.keys() and back.output_hessians.keys() == moments.output_hessians.keys()
        if moments.cross is not None:
            assert back.cross.dtype == np.float64 and back.cross.tobytes() == known.cross.tobytes() and back.streams["a.b"].tobytes() == known.streams["a.b"].tobytes()
            assert back.output_hessians["a.b"].matrix.tobytes() == hessians[1].matrix.tobytes()


@pytest.mark.parametrize("layer", [3, 11])
def test_what_was_begun_with_workers_is_finished_without_and_the_reverse(layer, run, processes, expected, tmp_path):
    """In the middle of a block, some of whose layers are then done and some not."""

    def stop(stage, done, total):
        if stage == "quantise" and done == layer:
            raise KeyboardInterrupt

    for first, second in ((processes, None), (None, processes)):
        with pytest.raises(KeyboardInterrupt):
            run("best", first, progress=stop)
        assert not list((tmp_path / ".out.partial").glob("*.scratch*")) and list((tmp_path / ".out.partial").glob("0*.safetensors"))
        calls = []
        assert run("best", second, progress=lambda *state: calls.append(state)) == expected("best") and [path.name for path in tmp_path.iterdir()] == ["out"]
        assert [call for call in calls if call[0] == "quantise"] == [("quantise", i + 1, 28) for i in range(28)]  # none of them twice
        (tmp_path / "out").rename(tmp_path.with_name(f"{tmp_path.name} {second}"))


def test_a_task_that_fails_ends_the_run_and_leaves_no_moments(run, expected, tmp_path, monkeypatch):
    write = tasks.write_matrices

    def full(part, matrices):
        if "model.layers.1.self_attn.o_proj" in matrices:
            raise OSError(28, f"could not write {part}: No space left on device")
        write(part, matrices)

    with monkeypatch.context() as patch, ThreadPoolExecutor(2) as executor, pytest.raises(OSError, match=r"could not write .*\.safetensors: No space left"):
        patch.setattr(tasks, "write_matrices", full)
        run("mr-gptq", executor)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"] and not list((tmp_path / ".out.partial").glob("*.scratch*"))
    with ThreadPoolExecutor(2) as executor:
        assert run("mr-gptq", executor) == expected("mr-gptq")


def test_a_task_of_an_earlier_run_takes_no_moments_of_this_one(run, expected, tmp_path):
    """Its worker may have lived on: it finds nothing under the name that it was given, whatever this run has written meanwhile."""
    late, refused = [], []

    class Late(Watched):
        def submit(self, function, task):
            if len(late) == 3:
                raise KeyboardInterrupt
            late.append(task)
            return Future()

    class Meanwhile(Watched):
        def submit(self, function, task):
            for other in late:
                with pytest.raises(FileNotFoundError):
                    function(other)
                refused.append(other)
            return super().submit(function, task)

    with pytest.raises(KeyboardInterrupt):
        run("mr-gptq", Late())
    assert run("mr-gptq", Meanwhile()) == expected("mr-gptq") and len(refused) == 3 * 16


def test_moments_that_find_no_room_leave_nothing(run, tmp_path, monkeypatch):
    """Neither of themselves nor of those before, whose tasks may be at work."""
    write = mg.checkpoint.safetensors.write_file

    def full(path, *rest):
        if path.name.startswith("2-"):
            raise OSError(28, f"could not write {path}: No space left on device")
        write(path, *rest)

    monkeypatch.setattr(tasks, "write_file", full)
    with ThreadPoolExecutor(2) as executor, pytest.raises(OSError, match="could not write .*2-.*scratch: No space left"):
        run("mr-gptq", executor)
    assert not list(tmp_path.glob(".out.partial/*.scratch*"))


def test_room_for_moments_is_asked_for_where_there_are_workers(run, leaf_folder, tmp_path, monkeypatch):
    plan = make_plan(leaf_folder, tmp_path / "out", RECIPES["mr-gptq"], **TEXT)
    free, needed = 0, []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, free))
    for workers in (nullcontext(), ThreadPoolExecutor(1)):
        with workers as executor, pytest.raises(OSError, match="bytes while it is made") as refusal:
            run("mr-gptq", executor)
        needed.append(int(re.search(r"needs (\d+) bytes", str(refusal.value))[1]))
    assert needed[1] - needed[0] == plan.moments_bytes > 0
    free = needed[0]
    assert run("mr-gptq", None)


def test_workers_and_this_process_have_threads_of_their_own(leaf_folder, calibration_text, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(group, "quantize_layer", lambda *args, threads, **kwargs: asked.append(threads) or mg.quantize_layer(*args, threads=threads, **kwargs))
    update, summed = mg.Hessian.update, set()
    monkeypatch.setattr(mg.Hessian, "update", lambda self, x, *, dtype=None, threads=None: summed.add(threads) or update(self, x, dtype=dtype, threads=threads))
    with ThreadPoolExecutor(2) as executor:
        quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", RECIPES["mr-gptq"], **TEXT), calibration_text, threads=2, executor=executor, worker_threads=3)
    assert asked == [3] * 28 and summed == {2}


@pytest.mark.parametrize(("arguments", "threads", "worker_threads"), [(["--workers", "3"], None, 2), (["--workers", "9"], None, 1), (["--workers", "2", "--threads", "5"], 5, 2), (["--threads", "5"], 5, 5)])
def test_workers_share_the_threads_on_the_command_line(arguments, threads, worker_threads, leaf_folder, tmp_path, monkeypatch):
    """This process keeps its own, by which torch's sums go."""
    asked = []

    def note(plan, text, **options):
        asked.append((options["threads"], options["worker_threads"], options["executor"] is None))
        raise ValueError("noted")

    monkeypatch.setattr(cli, "quantize_checkpoint", note)
    monkeypatch.setattr(cli, "default_threads", lambda: 8)
    monkeypatch.setattr(cli, "ProcessPoolExecutor", lambda *args, **options: ThreadPoolExecutor(1))
    (tmp_path / "text").write_text("words")
    assert cli.main(["quantize", str(leaf_folder), str(tmp_path / "out"), "--calibration", str(tmp_path / "text"), *arguments]) == 1
    assert asked == [(threads, worker_threads, "--workers" not in arguments)]


def test_memory_is_that_of_this_process_and_of_each_worker(leaf_folder, tmp_path, capsys):
    best = make_plan(leaf_folder, tmp_path / "out", RECIPES["best"], **TEXT)
    plain = make_plan(leaf_folder, tmp_path / "out", replace(RECIPES["best"], cross=0.0, output_hessian=None), **TEXT)
    assert [best.memory_of(n) - best.memory_bytes for n in (0, 1, 3)] == [0, best.worker_bytes, 3 * best.worker_bytes]
    # down's task was the largest, of 384 columns, and now it is gate's and up's, of 128: their output Hessians are of 384, two more of that size beside them
    down, gate = (4 * 4 * 128 * 384 + layers * 128 * 384 * 9 // 16 + 2 * 8 * cols**2 for layers, cols in ((1, 384), (2, 128)))
    assert plain.worker_bytes == down > gate and best.worker_bytes == gate + 8 * 128**2 + 8 * 384**2 * (2 + 2)
    rounded = make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn"))
    assert (rounded.memory_of(0), rounded.memory_of(2), rounded.moments_bytes) == (rounded.memory_bytes, 2 * rounded.memory_bytes, 0)
    (tmp_path / "text").write_text("words")
    command = ["quantize", str(leaf_folder), str(tmp_path / "out"), "--calibration", str(tmp_path / "text"), "--tokens", "512", "--sequence", "128", "--dry-run", "--workers", "2", "--memory-limit"]
    assert cli.main([*command, str(best.memory_of(2))]) == 0 and "more in each" in capsys.readouterr().out
    assert cli.main([*command, str(best.memory_of(2) - 1)]) == 1 and "with 2 workers" in capsys.readouterr().err


@pytest.fixture
def command(leaf_folder, calibration_text, tmp_path):
    """The command line with two workers and a text, without its first words."""
    folder = tmp_path.with_name(f"{tmp_path.name} text")
    folder.mkdir()
    (folder / "calibration.txt").write_text(calibration_text, encoding="utf-8")
    return ["quantize", str(leaf_folder), str(tmp_path / "out"), "--calibration", str(folder / "calibration.txt"), "--tokens", "512", "--sequence", "128", "--threads", "2"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_command_that_is_killed_while_workers_work_goes_on_with_them_and_without(command, expected, tmp_path, monkeypatch):
    """Killed when a block's moments lie there, which the next run sweeps up."""
    folder, stopped = tmp_path / ".out.partial", False
    for _ in range(5):  # a run that was faster than that is done again
        process = subprocess.Popen([sys.executable, "-m", "mrgptq.cli", *command, "--workers", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not stopped:
            if any(folder.glob("*.scratch")) and any(folder.glob("0*.safetensors")):
                process.send_signal(signal.SIGSTOP)
                while process.poll() is None and not is_stopped(process.pid):
                    time.sleep(0.001)
                stopped = any(folder.glob("*.scratch"))
                process.send_signal(signal.SIGKILL if stopped else signal.SIGCONT)
            time.sleep(0.001)
        _, err = process.communicate(timeout=60)  # which ends once no worker holds the pipe
        if stopped:
            break
        assert process.returncode == 0, err
        shutil.rmtree(tmp_path / "out")
    assert process.returncode == -signal.SIGKILL and "Traceback" not in err, err
    left, there = set(folder.glob("*.scratch")), []
    assert left and not (tmp_path / "out").exists()
    shutil.copytree(folder, tmp_path / ".again.partial")
    monkeypatch.setattr(cli._Progress, "__call__", lambda *state: there.extend(path for path in left if path.exists()))
    assert cli.main([*command, "--workers", "2"]) == 0 and not there
    assert cli.main([part.replace(str(tmp_path / "out"), str(tmp_path / "again")) for part in command]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "again") == expected("best") and sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


def test_a_worker_that_dies_is_said_and_the_run_goes_on_with_others(command, expected, tmp_path, capsys, monkeypatch):
    made = []

    class Pool(ProcessPoolExecutor):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(self)

    def progress(self, stage, done, total):
        if (stage, done) == ("quantise", 4):
            os.kill(next(iter(made[0]._processes)), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(cli, "ProcessPoolExecutor", Pool)
        patch.setattr(cli._Progress, "__call__", progress)
        assert cli.main([*command, "--workers", "2"]) == 1
    err = capsys.readouterr().err
    assert "a worker died, perhaps for want of memory" in err and "what is done is kept in" in err and not list((tmp_path / ".out.partial").glob("*.scratch*"))
    assert cli.main([*command, "--workers", "2"]) == 0 and "28 layers" in capsys.readouterr().out
    assert contents(tmp_path / "out") == expected("best") and [path.name for path in tmp_path.iterdir()] == ["out"]
