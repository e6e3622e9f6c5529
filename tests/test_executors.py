"""A run's tasks on any executor: here, in threads, in processes, on a dask cluster that loses a worker, through MPI where it is installed; the same bytes from all of them."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from folders import contents
from processes import children, is_alive

import mrgptq as mg
from mrgptq import cli, group, tasks
from mrgptq.checkpoint.safetensors import SafetensorsFile
from mrgptq.jobs import quantize_checkpoint
from mrgptq.plan import make_plan


@pytest.fixture(scope="module")
def expected(tmp_path_factory, leaf_folder, stored_hessians):
    """What a run without an executor writes."""
    out = tmp_path_factory.mktemp("here") / "out"
    quantize_checkpoint(make_plan(leaf_folder, out, mg.Recipe.named("mr-gptq"), hessians=stored_hessians))
    return contents(out)


def plan_of(leaf_folder, tmp_path, stored_hessians):
    return make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("mr-gptq"), hessians=stored_hessians)


def test_layers_are_those_that_quantize_layer_gives_under_these_hessians(leaf_folder, stored_hessians, expected, tmp_path):
    """Each group under its own Hessian, in NVFP4 with the tensor scale of its set."""
    out = tmp_path / "out"
    quantize_checkpoint(plan_of(leaf_folder, tmp_path, stored_hessians))
    got, weights, hessians, recipe = mg.load(out), mg.load(leaf_folder), mg.load_hessians(stored_hessians), mg.Recipe.named("mr-gptq")
    for set_ in ([f"model.layers.2.self_attn.{leaf}_proj" for leaf in "qkv"], ["model.layers.3.mlp.down_proj"]):
        scale = mg.shared_tensor_scale([weights[f"{name}.weight"] for name in set_], recipe)
        for name in set_:
            q = mg.quantize_layer(weights[f"{name}.weight"], hessians[name], recipe, tensor_scale=scale)
            assert np.array_equal(got[f"{name}.weight"].codes, q.codes) and np.array_equal(got[f"{name}.weight"].scales, q.scales)


@pytest.mark.parametrize("make", [lambda: ThreadPoolExecutor(3), lambda: ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")), lambda: ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("forkserver"))], ids=["threads", "spawn", "forkserver"])
def test_pools_give_the_same_bytes(make, leaf_folder, stored_hessians, expected, tmp_path):
    calls = []
    with make() as executor:
        reports = quantize_checkpoint(plan_of(leaf_folder, tmp_path, stored_hessians), executor=executor, worker_threads=1, progress=lambda *state: calls.append(state))
    assert contents(tmp_path / "out") == expected and calls == [("quantise", i + 1, 28) for i in range(28)] and len(reports) == 28


def test_workers_on_the_command_line(leaf_folder, stored_hessians, expected, tmp_path, capsys):
    assert cli.main(["quantize", str(leaf_folder), str(tmp_path / "out"), "--recipe", "mr-gptq", "--hessians", str(stored_hessians), "--workers", "2"]) == 0
    assert contents(tmp_path / "out") == expected and "28 layers" in capsys.readouterr().out


def test_a_task_carries_names_and_no_arrays(leaf_folder, tmp_path):
    """However large the layers are."""
    task = tasks.GroupTask(leaf_folder, ("model.layers.0.mlp.down_proj",), mg.Recipe.named("rtn"), tmp_path / "part.safetensors", threads=1)
    assert len(pickle.dumps(task)) < 2000
    assert tasks.quantize_group(pickle.loads(pickle.dumps(task))) == task.part and task.part.exists()


def test_a_task_done_twice_gives_the_same_layers(leaf_folder, tmp_path):
    """As where a cluster took a worker for dead; the second file takes the place of the first, and only the seconds of its reports are its own."""
    task = tasks.GroupTask(leaf_folder, ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"), mg.Recipe.named("rtn"), tmp_path / "part.safetensors", threads=1)

    def layers_done():
        found = [(name, matrix.codes.copy(), matrix.scales.copy(), matrix.tensor_scale, {**matrix.report.as_dict(), "seconds": 0.0}) for name, matrix in tasks.read_matrices(tasks.quantize_group(task), task.recipe)]
        return found, sorted(SafetensorsFile(task.part).names)

    once, twice = layers_done(), layers_done()
    np.testing.assert_equal(twice, once)
    assert [name for name, *_ in once[0]] == list(task.modules) and once[1] == sorted(f"{name}.{what}" for name in task.modules for what in ("codes", "scales"))
    assert os.listdir(tmp_path) == ["part.safetensors"]


def test_threads_of_a_worker_are_those_it_was_given(leaf_folder, tmp_path, monkeypatch):
    """Not the machine's: workers side by side would ask for the cores several times over."""
    asked = []
    monkeypatch.setattr(group, "quantize_layer", lambda *args, threads, **kwargs: asked.append(threads) or mg.quantize_layer(*args, threads=threads, **kwargs))
    with ThreadPoolExecutor(2) as executor:
        quantize_checkpoint(make_plan(leaf_folder, tmp_path / "out", mg.Recipe.named("rtn")), executor=executor, worker_threads=1)
    assert asked == [1] * 28


def test_a_worker_that_dies_is_said_and_the_run_goes_on_later(leaf_folder, stored_hessians, expected, tmp_path, capsys, monkeypatch):
    """Before the last task is given to any, so that at least that one is left."""

    class Pool(ProcessPoolExecutor):
        def submit(self, function, *args):
            submitted.append(function)
            if len(submitted) == 16 + 2:  # after two that the command starts its workers by, the last of leaf's groups
                next(iter(self._processes.values())).kill()
                while not self._broken:
                    time.sleep(0.01)
            return super().submit(function, *args)

    submitted = []
    with monkeypatch.context() as patch:
        patch.setattr(cli, "ProcessPoolExecutor", Pool)
        assert cli.main(["quantize", str(leaf_folder), str(tmp_path / "out"), "--recipe", "mr-gptq", "--hessians", str(stored_hessians), "--workers", "2"]) == 1
    assert len(submitted) == 18
    err = capsys.readouterr().err
    assert "a worker died, perhaps for want of memory" in err and not (tmp_path / "out").exists()
    quantize_checkpoint(plan_of(leaf_folder, tmp_path, stored_hessians))
    assert contents(tmp_path / "out") == expected


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("when", ["workers start", "layers are done"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_workers_end_with_the_command(end, when, leaf_folder, stored_hessians, tmp_path):
    """Killed, or interrupted from the terminal, which sends it to all of them: no worker is left, no traceback but that of a worker whose start the kill cut short, and the same command goes on. A run that was faster than that is done again."""
    for attempt in range(5):
        out = tmp_path / f"out{attempt}"
        command = [sys.executable, "-m", "mrgptq.cli", "quantize", str(leaf_folder), str(out), "--recipe", "best", "--cross", "0", "--output-hessian", "none", "--hessians", str(stored_hessians), "--workers", "2"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # not ignored, as in the background

        def reached():
            return len(children(process.pid)) >= 2 if when == "workers start" else any((tmp_path / f".{out.name}.partial").glob("0*.safetensors"))

        while process.poll() is None and not reached():
            time.sleep(0.001)
        workers = children(process.pid)
        if end == signal.SIGINT and process.poll() is None:
            os.killpg(process.pid, end)
        else:
            process.kill()
        _, err = process.communicate(timeout=60)  # which ends once no worker holds the pipe
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and any(map(is_alive, workers)):
            time.sleep(0.05)
        assert not any(map(is_alive, workers)), err
        if process.returncode in (0, -signal.SIGINT):  # it had ended, or its interpreter was about to
            continue
        assert "Traceback" not in err or (end == signal.SIGKILL and when == "workers start" and err.count("Traceback") == err.count("EOFError")), err
        break
    assert workers and process.returncode == (130 if end == signal.SIGINT else -end), err
    assert cli.main(command[3:]) == 0
    quantize_checkpoint(make_plan(leaf_folder, tmp_path / "here", replace(mg.Recipe.named("best"), cross=0.0, output_hessian=None), hessians=stored_hessians))
    assert contents(out) == contents(tmp_path / "here")


def test_the_first_task_that_fails_ends_the_run_by_name(leaf_folder, tmp_path):
    weights = {name: value for name, value in mg.load(leaf_folder).items() if name.startswith("model.layers.0.mlp") or name.startswith("model.layers.1.mlp")}
    broken = np.asarray(weights["model.layers.1.mlp.up_proj.weight"]).copy()
    broken[3, 4] = np.inf
    weights["model.layers.1.mlp.up_proj.weight"] = broken
    (tmp_path / "model").mkdir()
    from mrgptq.checkpoint.safetensors import write_file

    write_file(tmp_path / "model" / "model.safetensors", weights)
    with ThreadPoolExecutor(2) as executor, pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* row 3, column 4"):
        quantize_checkpoint(make_plan(tmp_path / "model", tmp_path / "out", mg.Recipe.named("rtn")), executor=executor)
    assert not (tmp_path / "out").exists()


def test_a_dask_cluster_that_loses_a_worker_gives_the_same_bytes(leaf_folder, calibration_text, stored_hessians, expected, tmp_path):
    """A scheduler and three workers on loopback, each a process of its own; one is killed, as by the system, after the third layer. Then a run with a text."""
    from distributed import Client

    environment = os.environ | {"DASK_DISTRIBUTED__ADMIN__TICK__LIMIT": "30s", "PYTHONPATH": os.pathsep.join(sys.path)}
    start = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--dashboard-address", ":0", "--scheduler-file", str(tmp_path / "scheduler.json")]
    processes = [subprocess.Popen(start, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
    try:
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--no-nanny", "--nthreads", "1", "--no-dashboard", "--scheduler-file", str(tmp_path / "scheduler.json")]
        processes += [subprocess.Popen([*worker, "--name", f"w{i}"], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for i in range(3)]
        with Client(scheduler_file=str(tmp_path / "scheduler.json"), timeout="60s") as client:
            client.wait_for_workers(3, timeout=60)

            def progress(stage, done, total):
                if done == 3:
                    processes[2].kill()

            quantize_checkpoint(plan_of(leaf_folder, tmp_path, stored_hessians), executor=client.get_executor(), worker_threads=1, progress=progress)
            assert contents(tmp_path / "out") == expected
            deadline = time.monotonic() + 30
            while len(client.scheduler_info(n_workers=-1)["workers"]) != 2 and time.monotonic() < deadline:
                time.sleep(0.1)
            assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2
            address = client.scheduler.address
            assert cli.main(["quantize", str(leaf_folder), str(tmp_path / "again"), "--recipe", "mr-gptq", "--hessians", str(stored_hessians), "--scheduler", address, "--threads", "1"]) == 0
            plans = [make_plan(leaf_folder, tmp_path / name, mg.Recipe.named("mr-gptq"), tokens=256, sequence=64) for name in ("by the cluster", "here")]
            quantize_checkpoint(plans[0], calibration_text, threads=1, executor=client.get_executor(), worker_threads=1)
            quantize_checkpoint(plans[1], calibration_text, threads=1)
        assert contents(tmp_path / "again") == expected and contents(plans[0].out) == contents(plans[1].out)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_mpi_gives_the_same_bytes(leaf_folder, stored_hessians, expected, tmp_path):
    """By the mpiexec beside this Python, where the wheel mpich puts it, or else the system's; the variables let Open MPI work for root and on few cores."""
    code = (
        "import sys, mrgptq as mg\nfrom mpi4py.futures import MPIPoolExecutor\nfrom mrgptq.jobs import quantize_checkpoint\nfrom mrgptq.plan import make_plan\n"
        "if __name__ == '__main__':\n    with MPIPoolExecutor() as executor:\n        quantize_checkpoint(make_plan(sys.argv[1], sys.argv[2], mg.Recipe.named('mr-gptq'), hessians=sys.argv[3]), executor=executor, worker_threads=1)\n"
    )
    (tmp_path / "run.py").write_text(code)
    beside = Path(sys.executable).with_name("mpiexec")
    open_mpi = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    command = [str(beside) if beside.exists() else "mpiexec", "-n", "3", sys.executable, "-m", "mpi4py.futures", str(tmp_path / "run.py"), str(leaf_folder), str(tmp_path / "out"), str(stored_hessians)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | open_mpi | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == expected
