"""Block Hadamard rotations in place and scaled, DRAM-cold, against scaling in place, an FFHT-style transform in plain C++ and NumPy's X @ H; run by run.py.

Rates are GB/s of float32 read and written (8 bytes an element). Before anything is timed, the answer is compared with mrgptq.reference bit for bit and the peers' with it to rounding.
"""

import numpy as np
from bounds import Cold, library
from timing import interleaved, records

import mrgptq as mg
from mrgptq import _core, reference

BLOCKS = (16, 32, 64, 128)


def check(block, bound):
    """Compare the core and the peers with the reference on a small matrix."""
    x = np.random.default_rng(1).standard_normal((48, 1024)).astype(np.float32)
    expected = reference.rotate(x, block)
    if not np.array_equal(mg.Hadamard(block).apply(x), expected):
        raise SystemExit(f"block {block}: other bytes than the reference's")
    peer = x.copy()
    bound.ffht_style(peer, peer.size, block, 2)
    numpy = (x.reshape(-1, block) @ mg.Hadamard(block).matrix).reshape(x.shape)
    for other in (peer, numpy):
        if not np.abs(other - expected).max() <= 1e-5 * np.abs(expected).max():
            raise SystemExit(f"block {block}: a peer answers something else")


def measure(threads: int, quick: bool, compare: bool) -> list[dict]:
    """Records of every block size."""
    rows, cols = (64, 1024) if quick else (4096, 4096)
    cold, bound, elements = Cold(rows, cols, quick), library(), rows * cols
    target, found = np.empty((rows, cols), np.float32), []
    for block in BLOCKS:
        check(block, bound)
        hadamard, rotation = mg.Hadamard(block).matrix, mg.Hadamard(block)

        def in_place(block=block):
            x = cold.next()
            _core.rotate_columns(x, block, x, threads)

        calls = {"bound: in-place scale": lambda: bound.bound_scale(cold.next(), elements, -1.0, threads), "Hadamard, in place": in_place}
        calls["Hadamard.apply, new array"] = lambda rotation=rotation: rotation.apply(cold.next(), threads=threads)
        calls["Hadamard.apply, out"] = lambda rotation=rotation: rotation.apply(cold.next(), out=target, threads=threads)
        if compare:
            calls["FFHT-style C++"] = lambda block=block: bound.ffht_style(cold.next(), elements, block, threads)
            calls["NumPy X @ H"] = lambda block=block, hadamard=hadamard: np.matmul(cold.next().reshape(-1, block), hadamard, out=target.reshape(-1, block))
        ours = ("bound: in-place scale", "FFHT-style C++", "NumPy X @ H")
        against = {name: ours for name in calls if name.startswith("Hadamard")}
        timings = interleaved(calls, budget=0.01 if quick else 1.5)
        found += records("rotations", f"block {block}", f"{rows} × {cols}", "GB/s", threads, timings, amount=8 * elements / 1e9, against=against)
    return found
