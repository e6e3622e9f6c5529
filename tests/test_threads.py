"""Threads: the core lets go of the GIL, starts no more threads than it is told, and a worker of a process pool takes one."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

import mrgptq as mg
from mrgptq import _core

LINUX = sys.platform == "linux"
RNG = np.random.default_rng(0)
# Large enough that a call lasts while another thread wakes up; where it does not, the call is made again.
W = (RNG.standard_normal((96, 512)) * 0.02).astype(np.float32)
X = RNG.standard_normal((1024, 512), dtype=np.float32)
H = X.T.astype(np.float64) @ X / len(X)
H = (H + H.T) / 2
Q = mg.quantize(W, "nvfp4")
FACTOR = mg.Factor(H)
CORE = FACTOR.core
PACKED = ("nvfp4", Q.codes, Q.scales, Q.tensor_scale)
MANY = mg.quantize(np.resize(X, (2048, 1024)), "nvfp4")  # for what only copies
TILES = mg.prepack(MANY).core_arrays()


def room_of(hessian):
    """A factor's memory with H in it."""
    room = _core.CholeskyFactor.room(len(hessian))
    room[...] = hessian
    return room


def core_calls():
    """{name: what gives (function, arguments)} of every function of the core that works on arrays; one that is missing here fails the test below."""
    sums = [_core.HessianSum(512), _core.HessianSum(512)]
    for each in sums:
        each.update(X[:1000], 1)
    return {
        "amax": lambda: (_core.amax, (X, 16, 1)),
        "first_nonfinite": lambda: (_core.first_nonfinite, (X, 1)),
        "quantize": lambda: (_core.quantize, ("nvfp4", "absmax", "even", False, X, 16, 1.0, 1)),
        "find_scales": lambda: (_core.find_scales, ("nvfp4", "absmax", "even", X, 16, 1.0, None, 1)),
        "encode": lambda: (_core.encode, ("nvfp4", W, 16, Q.scales, Q.tensor_scale, 1)),
        "dequantize": lambda: (_core.dequantize, ("nvfp4", Q.codes, Q.scales, Q.tensor_scale, 1)),
        "dequantize_into": lambda: (_core.dequantize_into, ("nvfp4", Q.codes, Q.scales, Q.tensor_scale, np.empty_like(W), 1)),
        "round_to_grid": lambda: (_core.round_to_grid, ("nvfp4", "absmax", "even", False, X, 16, 1.0, np.empty_like(X), 1)),
        "matmul": lambda: (_core.matmul, (X[:300], PACKED, np.empty((300, len(W)), np.float32), 1)),
        "make_tiles": lambda: (_core.make_tiles, (MANY.core_arrays(), np.empty(TILES[2].shape, np.uint32), np.empty(TILES[3].shape, np.uint32), 1)),
        "read_tiles": lambda: (_core.read_tiles, (TILES, np.empty_like(MANY.codes), np.empty_like(MANY.scales), 1)),
        "matmul_packed": lambda: (_core.matmul_packed, (PACKED, PACKED, np.empty((len(W), len(W)), np.float32), 1)),
        "matmul_int8": lambda: (_core.matmul_int8, (X[:300], PACKED, np.empty((300, len(W)), np.float32), 1)),
        "pack": lambda: (_core.pack, (np.zeros((2048, 512), np.uint8), 1)),
        "unpack": lambda: (_core.unpack, (np.zeros((2048, 512), np.uint8), 1)),
        "rotate_columns": lambda: (_core.rotate_columns, (X, 16, np.empty_like(X), 1)),
        "rotate_both": lambda: (_core.rotate_both, (H.copy(), 16, 1)),
        "rotate_hessian": lambda: (_core.rotate_hessian, (H.copy(), 16, 1)),
        "HessianSum.update": lambda: (sums[0].update, (X, 1)),
        "HessianSum.merge": lambda: (sums[0].merge, (sums[1], 1)),
        "HessianSum.matrix": lambda: (sums[0].matrix, (np.empty_like(H), 1)),
        "square_sums": lambda: (_core.square_sums, ("nvfp4", W, 16, Q.codes, Q.scales, Q.tensor_scale, 1)),
        "fit_sums": lambda: (_core.fit_sums, ("nvfp4", W, 16, Q.codes, Q.scales, Q.tensor_scale, 1)),
        "CholeskyFactor": lambda: (_core.CholeskyFactor, (room_of(H), "activation", 0.01, 1, "float64", 1)),
        "solve": lambda: (_core.solve, ("nvfp4", W, 16, Q.scales.copy(), Q.tensor_scale, CORE, None, "float32", False, "even", 0, 1)),
        "shift_to_inputs": lambda: (_core.shift_to_inputs, (W, 16, H, W, CORE, 0.5, 1)),
        "SecondMoment.matrix": lambda: (CORE.second_moment().matrix, (1,)),
        "make_symmetric": lambda: (_core.make_symmetric, (H, np.empty_like(H), 1)),
        "quadratic_forms": lambda: (_core.quadratic_forms, (W, 16, [PACKED], CORE.second_moment(), "float64", 1)),
        "diagonal_form": lambda: (_core.diagonal_form, (W, 16, np.ones((1, W.shape[1])), 1)),
        "coupled_form": lambda: (_core.coupled_form, (W, 16, PACKED, _core.SecondMoment(np.eye(len(W))), CORE.second_moment(), "float32", 1)),
    }


@pytest.fixture
def no_forced_switches():
    """A Python thread gives the GIL away only where it lets go of it itself, so a call that keeps it keeps it to its end."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("name", core_calls())
def test_another_python_thread_runs_while_the_core_works(no_forced_switches, name):
    call, seen, done = core_calls()[name], [0], []

    def count():
        while not done:
            time.sleep(0)  # lets go of the GIL, even for no time
            seen[0] += 1

    watcher = threading.Thread(target=count)
    watcher.start()
    try:
        for _ in range(2000):
            function, arguments = call()  # NumPy lets go of the GIL too where it makes a large array, so before we look
            before = seen[0]
            function(*arguments)
            if seen[0] > before:
                break
        else:
            pytest.fail(f"in 2000 calls of {name} no other Python thread could run: the GIL is kept")
    finally:
        done.append(True)
        watcher.join()


def test_no_array_function_is_missing_above():
    plain = {"build_info", "supported_levels", "group_size", "nvfp4_tensor_scale", "mx_tensor_scale", "HessianSum", "SecondMoment"}
    elements = {f"{way}_{element}" for way in ("encode", "decode") for element in ("e2m1", "e4m3", "e8m0")}  # of single values, for tests and for looking at codes
    offered = {name for name in vars(_core) if not name.startswith("_") and name not in ("importlib", "os", "ModuleType")}
    methods = {f"HessianSum.{name}" for name in ("update", "merge", "matrix")} | {"SecondMoment.matrix"}
    assert offered - plain - elements | methods == set(core_calls())


def test_two_python_threads_quantise_two_layers_side_by_side(no_forced_switches, monkeypatch):
    """Both are inside the solver at one time: neither waits for the other's GIL."""
    inside, most, solve = [0], [0], _core.solve

    def counted(*arguments):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        try:
            return solve(*arguments)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(_core, "solve", counted)
    recipe, expected = mg.Recipe(precision="float32"), []
    together = threading.Barrier(2)

    def work(weight):
        for _ in range(2000):  # on one busy core most are too short to meet
            together.wait(timeout=60)
            expected.append((weight[0, 0], mg.quantize_layer(weight, None, recipe, factor=FACTOR, threads=1).codes))
            together.wait(timeout=60)
            if most[0] == 2:
                return

    threads = [threading.Thread(target=work, args=(weight,)) for weight in (W, W[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 2
    alone = {weight[0, 0]: mg.quantize_layer(weight, None, recipe, factor=FACTOR, threads=1).codes for weight in (W, W[::-1])}
    assert all(np.array_equal(codes, alone[key]) for key, codes in expected)


# ---- How many threads

COUNT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from worker_threads import count_in_worker
print(json.dumps({threads: count_in_worker(int(threads) or None) for threads in sys.argv[2:]}))
"""


def fresh_counts(*threads, openmp_threads=None):
    """{threads: count_in_worker(threads)} in a new process; 0 stands for None. In that order: OpenMP keeps the threads it has started."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT")} | ({} if openmp_threads is None else {"OMP_NUM_THREADS": str(openmp_threads)})
    done = subprocess.run([sys.executable, "-c", COUNT, os.path.dirname(__file__), *map(str, threads)], env=environment | {"OPENBLAS_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {int(key): value for key, value in json.loads(done.stdout).items()}


@pytest.mark.parametrize(("value", "told"), [("3", True), ("4,2", True), (" 2 ", True), ("0", False), ("abc", False), ("-3", False), (" ", False), (None, False)])
def test_a_number_of_openmp_threads_that_is_none_tells_nothing(value, told):
    """OpenMP passes over such a value, and so a worker of a pool takes one thread."""
    environment = {name: each for name, each in os.environ.items() if name != "OMP_NUM_THREADS"} | ({} if value is None else {"OMP_NUM_THREADS": value})
    done = subprocess.run([sys.executable, "-c", "import mrgptq.arrays; print(mrgptq.arrays._THREADS_TOLD)"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(told)]


@pytest.mark.skipif(not LINUX, reason="counts the entries of /proc/self/task")
def test_no_more_threads_than_asked_are_started():
    counts = fresh_counts(1, 3, 2)
    assert counts[1]["started"] == 0  # not one function of the package starts a thread for itself
    assert counts[3]["started"] == 2  # the caller's own is the third
    assert counts[2]["started"] <= 0  # those that wait serve, or end


@pytest.mark.skipif(not LINUX, reason="counts the entries of /proc/self/task")
@pytest.mark.parametrize("openmp_threads", [1, 3])
def test_omp_num_threads_is_what_none_means(openmp_threads):
    counted = fresh_counts(0, openmp_threads=openmp_threads)[0]
    assert counted == {"started": openmp_threads - 1, "threads": openmp_threads}


def test_without_it_none_means_one_thread_a_core():
    assert fresh_counts(0)[0]["threads"] == (len(os.sched_getaffinity(0)) if LINUX else os.cpu_count())


@pytest.mark.skipif(not LINUX, reason="forkserver, and /proc/self/task")
@pytest.mark.parametrize(
    ("method", "openmp_threads", "asked", "expected"),
    # A fork takes one: libgomp hangs in a child forked after its parent's threads have worked.
    [(method, *case) for case in ((None, None, 1), (None, 2, 2), (2, None, 2)) for method in ("spawn", "forkserver", "fork") if method != "fork" or case[-1] == 1],
)
def test_a_worker_of_a_pool_takes_one_thread_unless_told(method, openmp_threads, asked, expected):
    """As many workers as cores, each with as many threads, would be that number squared."""
    done = subprocess.run(
        [sys.executable, os.path.join(os.path.dirname(__file__), "worker_threads.py"), method, str(asked or 0)],
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {"OPENBLAS_NUM_THREADS": "1"} | ({"OMP_NUM_THREADS": str(openmp_threads)} if openmp_threads else {}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for counted in json.loads(done.stdout):
        assert counted == {"started": expected - 1, "threads": 1 if openmp_threads is None else openmp_threads}


def test_the_parent_of_a_pool_keeps_its_cores():
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        pool.submit(os.getpid).result()
        assert mg.build_info()["threads"] == _core.build_info()["threads"]
