"""Block Hadamard rotations in place and scaled, DRAM-cold, against scaling in place, an FFHT-style transform in plain C++ and NumPy's X @ H.

    python bench/bench_rotations.py --threads 2 --json rotations.json

Rates are GB/s of float32 read and written (8 bytes an element). Before anything is timed, the answer is compared with mrgptq.reference bit for bit and the peers' with it to rounding.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
from memory import Cold, interleaved, library, rows_of, settle, show

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


def measure(threads=2, quick=False, compare=True, shape=(4096, 4096)):
    """Records of every block size: see memory.rows_of."""
    rows, cols = (64, 1024) if quick else shape
    cold, bound, elements = Cold(rows, cols, quick=quick), library(), rows * cols
    target, records = np.empty((rows, cols), np.float32), []
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
        seconds = interleaved(calls, budget=0.01 if quick else 1.5)
        records += rows_of("rotations", f"block {block}", f"{rows}x{cols}", threads, seconds, dict.fromkeys(calls, 8 * elements / 1e9), "GB/s", against)
    return records


def main():
    """Measure, print, write."""
    settle()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    records = measure(args.threads, args.quick)
    show(records)
    print(mg.build_info())
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
