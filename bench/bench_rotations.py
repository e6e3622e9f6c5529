"""Block Hadamard rotations in place and scaled, DRAM-cold, against scaling in place, an FFHT-style transform in plain C++ and NumPy's X @ H; run by run.py.

Rates are GB/s of float32 read and written (8 bytes an element). Before anything is timed, every answer is compared with mrgptq.reference bit for bit and the peers' with it to rounding.
"""

import numpy as np
from bounds import Cold, library
from timing import interleaved, must_equal, records

import mrgptq as mg
from mrgptq import _core, reference

BLOCKS = (16, 32, 64, 128)
SMALL = 48, 1024


def contenders(block, cold, threads):
    """{name: call} of the core, each over the next matrix. A call returns what it answers."""
    rotation = mg.Hadamard(block)

    def in_place():
        x = cold.next()
        _core.rotate_columns(x, block, x, threads)
        return x

    return {
        "Hadamard, in place": in_place,
        "Hadamard.apply, new array": lambda: rotation.apply(cold.next(), threads=threads),
        "Hadamard.apply, out": lambda: rotation.apply(cold.next(), out=cold.target(), threads=threads),
    }


def peers(block, cold, threads):
    """The same of the peers."""
    matrix = reference.rotate(np.eye(block, dtype=np.float32), block)

    def ffht_style():
        x = cold.next()
        library().ffht_style(x, x.size, block, threads)
        return x

    def multiply():
        target = cold.target()
        np.matmul(cold.next().reshape(-1, block), matrix, out=target.reshape(-1, block))
        return target

    return {"FFHT-style C++": ffht_style, "NumPy X @ H": multiply}


def check(block, threads, compare):
    """Compare the core and the peers with the reference on a small matrix."""
    cold = Cold(*SMALL, quick=True)
    expected = reference.rotate(cold.matrices[0], block)
    for name, call in contenders(block, cold, threads).items():
        must_equal(f"block {block}, {name}", [call()], [expected])
    for name, call in peers(block, cold, threads).items() if compare else ():
        if not np.abs(call() - expected).max() <= 1e-5 * np.abs(expected).max():
            raise SystemExit(f"block {block}: {name} answers something else")


def measure(threads: int, quick: bool, compare: bool) -> list[dict]:
    """Records of every block size."""
    bound = library()
    for block in BLOCKS:
        check(block, threads, compare)
    rows, cols = (64, 1024) if quick else (4096, 4096)
    cold, elements, found = Cold(rows, cols, quick), rows * cols, []
    for block in BLOCKS:
        ours = contenders(block, cold, threads)
        calls = {"bound: in-place scale": lambda: bound.bound_scale(cold.next(), elements, -1.0, threads)} | ours | (peers(block, cold, threads) if compare else {})
        against = dict.fromkeys(ours, ("bound: in-place scale", "FFHT-style C++", "NumPy X @ H"))
        timings = interleaved(calls, quick=quick, budget=1.5)
        found += records("rotations", f"block {block}", f"{rows} × {cols}", "GB/s", threads, timings, amount=8 * elements / 1e9, against=against)
    return found
