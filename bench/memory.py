"""What the benchmarks of codecs and rotations share: the machine's memory bounds, data larger than its caches, contenders in turns."""

import ctypes
import subprocess
import tempfile
import time
from functools import cache
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np


@cache
def library() -> ctypes.CDLL:
    """bench/memory.cc, compiled for this machine."""
    folder = Path(tempfile.mkdtemp(prefix="mrgptq-bench-"))
    subprocess.run(["c++", "-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-o", folder / "memory.so", Path(__file__).with_name("memory.cc")], check=True)
    loaded = ctypes.CDLL(str(folder / "memory.so"))
    array, count = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS"), ctypes.c_ssize_t
    loaded.bound_read.argtypes, loaded.bound_read.restype = [array, count, ctypes.c_int], ctypes.c_float
    loaded.bound_copy.argtypes = [array, array, count, ctypes.c_int]
    loaded.bound_scale.argtypes = [array, count, ctypes.c_float, ctypes.c_int]
    loaded.ffht_style.argtypes = [array, count, count, ctypes.c_int]
    return loaded


def _last_level_cache() -> int:
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20}[size[-1]] for size in sizes if size[-1:] in ("K", "M")), default=32 << 20)


class Cold:
    """Copies of a (rows, cols) float32 matrix, together at least four times the last-level cache: ``next()`` gives the one that was not touched for longest."""

    def __init__(self, rows: int, cols: int, *, quick: bool = False) -> None:
        rng = np.random.default_rng(0)
        first = (rng.standard_t(5, (rows, cols), ) * 0.02).astype(np.float32)
        copies = 2 if quick else max(2, -(-4 * _last_level_cache() // first.nbytes))
        self.matrices = [first] + [first.copy() for _ in range(copies - 1)]
        self.next = cycle(self.matrices).__next__


def interleaved(contenders, *, budget=2.0, at_least=3, at_most=25):
    """{name: sorted seconds}: a call of each to warm up, then rounds in which each is called once; at most ``budget`` seconds a contender, but ``at_least`` rounds."""
    seconds = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    begin = time.perf_counter()
    for done in range(at_most):
        if done >= at_least and time.perf_counter() - begin > budget * len(contenders):
            break
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: sorted(values) for name, values in seconds.items()}


def rows_of(room, work, shape, threads, seconds, amount, unit, against):
    """Records of one interleaved measurement: rates ``amount[name] / seconds``, and against[name] = {bound or peer: amount it is compared by}."""
    rows = []
    for name, values in seconds.items():
        rates = sorted(amount[name] / value for value in values)
        row = {"room": room, "work": work, "contender": name, "shape": shape, "unit": unit, "median": median(rates), "low": rates[0], "high": rates[-1], "threads": threads, "calls": len(values)}
        # Ratios compare the medians of rates in the same unit.
        row["ratios"] = {other: row["median"] / (amount[other] / median(seconds[other])) for other in against.get(name, ()) if other in seconds}
        rows.append(row)
    return rows


def show(rows):
    """Records as lines."""
    for row in rows:
        ratios = "".join(f"   {ratio:.2f} x {other}" for other, ratio in row.get("ratios", {}).items())
        print(f"{row['work']:<22} {row['shape']:<12} {row['contender']:<34} {row['median']:8.3f} {row['unit']:<7} ({row['low']:.3f} – {row['high']:.3f}, {row['calls']} calls){ratios}", flush=True)


def settle():
    """Start this program anew without the variables that make OpenBLAS take another kernel than this processor's, and with waiting threads that sleep."""
    import os
    import sys

    unset = [name for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE") if name in os.environ]
    if unset or "OMP_WAIT_POLICY" not in os.environ:
        environment = {name: value for name, value in os.environ.items() if name not in unset} | {"OMP_WAIT_POLICY": "passive"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
