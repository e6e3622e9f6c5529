"""What test_threads.py runs in other processes: a little of everything, and how many threads of the system it left.

    python worker_threads.py spawn|forkserver|fork THREADS        prints the counts of a pool's workers; THREADS 0 is None
"""

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np

import mrgptq as mg


def system_threads():
    """Threads of this process, asleep or not."""
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0


def count_in_worker(threads):
    """{started: threads of the system that the work added, threads: what None means here}."""
    before = system_threads()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1100, 256)).astype(np.float32)
    hessian, other = mg.Hessian(256), mg.Hessian(256)
    hessian.update(x, threads=threads)
    other.update(x[:300], threads=threads)
    hessian.merge(other, threads=threads)
    hessian.as_array(threads=threads)
    if threads is None:
        mg.Factor(hessian).hessian.sum()  # a property, which follows the default
    weight = x[:400]
    mg.Hadamard(16).apply(weight, threads=threads)
    mg.Hadamard(16).apply_hessian(hessian, threads=threads)
    mg.Dense(np.eye(16)[::-1]).apply(weight, threads=threads)
    mg.round_activations(x, "mxfp4", threads=threads)
    mg.matmul(x, mg.quantize_activations(weight, "mxfp4", threads=threads), threads=threads)
    for activations in ("nvfp4", "int8"):
        mg.matmul(x, mg.quantize_activations(weight, "mxfp4", threads=threads), activations=activations, threads=threads)
    mg.alternating_tensor_scale([weight], iterations=1, threads=threads)
    q = mg.quantize(weight, "nvfp4", threads=threads)
    mg.unpack(q.codes, threads=threads)
    mg.pack(mg.unpack(q.codes, threads=threads), threads=threads)
    for recipe in ("rtn", "mr-gptq", "best"):
        mg.quantize_layer(weight, hessian, recipe, output_hessian=np.eye(len(weight)) if recipe == "best" else None, threads=threads).dequantize(unrotate=True, threads=threads)
    return {"started": system_threads() - before, "threads": mg.build_info()["threads"]}


BEFORE = {}  # threads by process, before any work


def count_since_start(threads):
    """The same for all that the process has done: a quick worker may take the slow one's share too."""
    before = BEFORE.setdefault(os.getpid(), system_threads())
    return count_in_worker(threads) | {"started": system_threads() - before}


if __name__ == "__main__":
    method, asked = sys.argv[1], int(sys.argv[2]) or None
    if method == "fork":
        mg.quantize(np.ones((64, 64)), threads=2)  # OpenMP's threads have worked before the fork
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as pool:
        print(json.dumps(list(pool.map(count_since_start, [asked, asked]))))
