"""What this machine can do at most, measured in the process of the contenders: memory traffic, fused multiply-adds, SGEMM.

The library is the CMake target ``bounds`` (bench/cpp), built on demand into build/bench; SGEMM is NumPy's.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
from timing import interleaved, records

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "bench"


def build(target: str) -> None:
    """Build a target of bench/cpp; a failure ends the benchmark with the compiler's words."""
    scripts = sysconfig.get_path("scripts")  # cmake and ninja may come as wheels
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise SystemExit("the machine's bounds are a small C++ library that cmake builds; install cmake, or the extra 'bench'")
    eigen = [folder for folder in sys.path if (Path(folder) / "cmeel.prefix").is_dir()]  # where the wheel cmeel-eigen lies
    environment = os.environ | {"PATH": path, "CMAKE_PREFIX_PATH": os.pathsep.join([*eigen, *filter(None, [os.environ.get("CMAKE_PREFIX_PATH")])])}
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    for command in ([cmake, "-S", str(ROOT), "-B", str(BUILD), *generator, "-DMRGPTQ_PYTHON=OFF", "-DMRGPTQ_BENCH=ON", "-DMRGPTQ_ISA=native"], [cmake, "--build", str(BUILD), "--target", target]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


@cache
def library() -> ctypes.CDLL:
    """The library of bench/cpp/bounds.h and ffht_style.h; calls drop the GIL."""
    build("bounds")
    loaded = ctypes.CDLL(str(BUILD / "libbounds.so"))
    array = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    count, threads = ctypes.c_int64, ctypes.c_int
    loaded.bound_copy.argtypes, loaded.bound_copy.restype = [array, array, count, threads], None
    loaded.bound_scale.argtypes, loaded.bound_scale.restype = [array, count, ctypes.c_float, threads], None
    loaded.bound_sum.argtypes, loaded.bound_sum.restype = [array, count, threads], ctypes.c_float
    loaded.ffht_style.argtypes, loaded.ffht_style.restype = [array, count, count, threads], None
    for name in ("bound_fma_float", "bound_fma_double"):
        getattr(loaded, name).argtypes, getattr(loaded, name).restype = [count, threads], ctypes.c_double
    return loaded


def _last_level_cache() -> int:
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]] for size in sizes if size[-1:] in ("K", "M")), default=32 << 20)


def cold_bytes(quick: bool = False) -> int:
    """Bytes over which a measurement of memory has to cycle: four times the last-level cache, at least 256 MiB; a MiB where it is only to be seen that it runs."""
    return 1 << 20 if quick else max(256 << 20, 4 * _last_level_cache())


class Cold:
    """Copies of a (rows, cols) float32 matrix, together ``cold_bytes`` at least, and as many targets: ``next()`` gives the copy, ``target()`` the target that was not touched for longest."""

    def __init__(self, rows: int, cols: int, quick: bool = False) -> None:
        first = (np.random.default_rng(0).standard_t(5, (rows, cols)) * 0.02).astype(np.float32)
        self.matrices = [first] + [first.copy() for _ in range(max(1, -(-cold_bytes(quick) // first.nbytes) - 1))]
        self.next = cycle(self.matrices).__next__
        self.target = cycle([np.full_like(first, np.nan) for _ in self.matrices]).__next__  # written, so that no page is cleared under a measurement

    def copies(self, *arrays: np.ndarray) -> Callable[[], tuple[np.ndarray, ...]]:
        """The turn of as many copies of other arrays: what is read or written beside a matrix."""
        return cycle([tuple(array.copy() for array in arrays) for _ in self.matrices]).__next__


@cache
def _rows(threads: int, quick: bool) -> tuple[dict, ...]:
    bound, count = library(), cold_bytes(quick) // 4
    x, y = np.ones(count, np.float32), np.zeros(count, np.float32)
    bound.bound_copy(y, x, count, threads)
    bound.bound_scale(y, count, 2.0, threads)
    if not (y == 2).all() or bound.bound_sum(x[:1000], 1000, threads) != 1000.0:
        raise SystemExit("the bounds' own answers are wrong: they are worth nothing")
    n = 256 if quick else 4096
    a, b, c = (np.random.default_rng(seed).standard_normal((n, n), dtype=np.float32) for seed in range(3))
    rounds = 1000 if quick else 10_000_000
    flops = {name: getattr(bound, name)(1, threads) * rounds for name in ("bound_fma_float", "bound_fma_double")}
    traffic, gb = f"{4 * count / 2**20:.0f} MiB", 4 * count / 1e9
    work = {  # name: (call, shape, unit, units a call does)
        "read": (lambda: bound.bound_sum(x, count, threads), traffic, "GB/s", gb),
        "memcpy, read + write": (lambda: bound.bound_copy(y, x, count, threads), traffic, "GB/s", 2 * gb),
        "in-place scale, read + write": (lambda: bound.bound_scale(y, count, 1.0, threads), traffic, "GB/s", 2 * gb),
        "FMA float32": (lambda: bound.bound_fma_float(rounds, threads), "registers", "GFLOP/s", flops["bound_fma_float"] / 1e9),
        "FMA float64": (lambda: bound.bound_fma_double(rounds, threads), "registers", "GFLOP/s", flops["bound_fma_double"] / 1e9),
        "SGEMM, NumPy": (lambda: np.matmul(a, b, out=c), f"{n}³", "GFLOP/s", 2 * n**3 / 1e9),
    }
    timings = interleaved({name: call for name, (call, *_) in work.items()}, quick=quick, budget=1.0)
    return tuple(records("machine", name, shape, unit, threads, {"bound": timings[name]}, amount=amount)[0] for name, (_, shape, unit, amount) in work.items())


def measure(threads: int, quick: bool, compare: bool) -> list[dict]:
    """The machine's own records; ``compare`` changes nothing: every bound is a comparison."""
    return [dict(row) for row in _rows(threads, quick)]


def bound(work: str, threads: int, quick: bool = False) -> float:
    """The median rate of "read", "memcpy", "in-place scale" (GB/s), "FMA float32", "FMA float64" or "SGEMM" (GFLOP/s), measured once in this process."""
    return next(row["median"] for row in _rows(threads, quick) if row["work"].startswith(work))
