"""Quantise and dequantise, DRAM-cold, against the machine's memory bounds and ggml; run by run.py.

Rates are 10^9 matrix elements per second. A bound is turned into elements by the bytes a work moves: 4.53 (MXFP4) or 4.56 (NVFP4) an element, against reading (quantise) or memcpy, read and
written bytes together (dequantise). Before anything is timed, all that the core will answer is compared with mrgptq.reference bit for bit.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from bounds import Cold, library
from timing import absent, interleaved, must_equal, records

import mrgptq as mg
from mrgptq import _core, reference

GROUP = {"nvfp4": 16, "mxfp4": 32}
SCALES = {"nvfp4": ("absmax", "mse", "fpquant_mse"), "mxfp4": ("even", "floor", "four-thirds", "mse", "fpquant_mse")}
SMALL = 12, 1568  # a strip of four chunks and what a row leaves over; several pieces for the threads


def bytes_of(format):
    """Bytes an element: float32, half a byte of code, its share of a scale."""
    return 4 + 0.5 + 1 / GROUP[format]


def rule_of(format, scales):
    """(search, MX rule, divisor) of a name in SCALES."""
    search, rule = ("absmax", scales) if scales in mg.MX_RULES else (scales, "even")
    return search, rule, 3000.0 if format == "nvfp4" else 3.0 if rule == "four-thirds" else 1.0


def contenders(format, cold, threads):
    """{name: call} of the core, each over the next matrix. A call returns what it answers, which check() compares before it is timed."""
    plain, block = SCALES[format][0], GROUP[format]
    divisor = rule_of(format, plain)[2]

    def quantise(scales, turn=0):
        search, rule, divisor = rule_of(format, scales)
        return _core.quantize(format, search, rule, False, cold.next(), turn, divisor, threads)

    def round_to_grid():
        target = cold.target()
        return _core.round_to_grid(format, "absmax", "even", False, cold.next(), 0, divisor, target, threads), target

    codes, found, _ = quantise(plain)
    stored = cold.copies(codes, found)

    def dequantise():
        target = cold.target()
        _core.dequantize_into(format, *stored(), divisor, target, threads)
        return (target,)

    calls = {f"quantise {scales}": lambda scales=scales: quantise(scales) for scales in SCALES[format]}
    calls["rotate + quantise, one pass"] = lambda: quantise(plain, block)
    if format == "nvfp4":
        calls["amax + quantise absmax"] = lambda: (_core.amax(cold.next(), 0, threads), *quantise(plain))
    return calls | {"round to the grid": round_to_grid, "dequantise": dequantise}


@cache
def definition(format):
    """What every contender of a format has to answer on the small matrix."""
    w = Cold(*SMALL, quick=True).matrices[0]

    def quantised(w, scales):
        codes, found, divisor = reference.quantize(w, format, *rule_of(format, scales))
        return (reference.pack(codes), found, -1), reference.dequantize(codes, found, format, divisor)

    answers = {f"quantise {scales}": quantised(w, scales)[0] for scales in SCALES[format]}
    plain, values = quantised(w, SCALES[format][0])
    answers["rotate + quantise, one pass"] = quantised(reference.rotate(w, GROUP[format]), SCALES[format][0])[0]
    answers["amax + quantise absmax"] = (np.abs(w).max(), *plain)
    return answers | {"round to the grid": (-1, values), "dequantise": (values,)}


def check(format, threads):
    """Compare the core with the reference on a small matrix: end here where they differ."""
    for name, call in contenders(format, Cold(*SMALL, quick=True), threads).items():
        must_equal(f"{format}, {name}", call(), definition(format)[name])


def ggml_calls(folder, format, cold, threads):
    """(quantise, dequantise) of ggml over the rows, in as many threads; None where it lacks the format."""
    ggml = ctypes.CDLL(str(Path(folder) / "libggml-base.so"))
    quantize, dequantize = getattr(ggml, f"quantize_{format}", None), getattr(ggml, f"dequantize_row_{format}", None)
    if quantize is None or dequantize is None:
        return None
    quantize.argtypes, quantize.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p], ctypes.c_size_t
    dequantize.argtypes, dequantize.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    rows, cols = cold.matrices[0].shape
    row_bytes = cols // 32 * 17 if format == "mxfp4" else cols // 64 * 36
    pool, cuts = ThreadPoolExecutor(threads), [rows * t // threads for t in range(threads + 1)]

    def forth(w, to):
        def part(t):
            quantize(w.ctypes.data + 4 * cuts[t] * cols, to.ctypes.data + cuts[t] * row_bytes, cuts[t + 1] - cuts[t], cols, None)

        list(pool.map(part, range(threads)))

    def back(stored, to):
        def part(t):
            dequantize(stored.ctypes.data + cuts[t] * row_bytes, to.ctypes.data + 4 * cuts[t] * cols, (cuts[t + 1] - cuts[t]) * cols)

        list(pool.map(part, range(threads)))

    first, values = np.zeros(rows * row_bytes, np.uint8), cold.target()
    forth(cold.matrices[0], first)
    back(first, values)
    error = float(np.square(values - cold.matrices[0]).sum() / np.square(cold.matrices[0]).sum())
    if not error < 0.03:
        raise SystemExit(f"ggml's {format} loses {error:.3g} of the energy: it was called wrongly")
    packed = cold.copies(first)
    return lambda: forth(cold.next(), *packed()), lambda: back(*packed(), cold.target())


def measure(threads: int, quick: bool, compare: bool, ggml: Path | None = None) -> list[dict]:
    """Records of every format and rule; ``ggml``: the folder of its libraries."""
    bound = library()
    for format in GROUP:
        check(format, threads)
    rows, cols = (64, 1024) if quick else (4096, 4096)
    cold, elements = Cold(rows, cols, quick), rows * cols

    found = []
    for format in GROUP:
        each = bytes_of(format)
        calls = {"bound: read": lambda: bound.bound_sum(cold.next(), elements, threads), "bound: memcpy": lambda: bound.bound_copy(cold.target(), cold.next(), elements, threads)}
        amount = {"bound: read": 4 / each * elements / 1e9, "bound: memcpy": 8 / each * elements / 1e9}
        calls |= contenders(format, cold, threads)
        against = {f"quantise {scales}": ("bound: read", "ggml quantise") for scales in SCALES[format]}
        against["rotate + quantise, one pass"] = (f"quantise {SCALES[format][0]}",)
        against["amax + quantise absmax"] = ("bound: read",)
        against["round to the grid"] = ("bound: memcpy",)
        against["dequantise"] = ("bound: memcpy", "ggml dequantise")
        if compare and ggml and (peer := ggml_calls(ggml, format, cold, threads)):
            calls["ggml quantise"], calls["ggml dequantise"] = peer
        elif compare:
            found.append(absent("codecs", format, "ggml quantise", f"{rows} × {cols}", "Gelt/s", threads, f"no ggml with {format}: pass --ggml"))
        timings = interleaved(calls, quick=quick, budget=1.5)
        found += records("codecs", format, f"{rows} × {cols}", "Gelt/s", threads, timings, amount={name: amount.get(name, elements / 1e9) for name in calls}, against=against)
    return found
