"""Quantise and dequantise, DRAM-cold, against the machine's memory bounds and ggml; run by run.py.

Rates are 10^9 matrix elements per second. A bound is turned into elements by the bytes a work moves: 4.53 (MXFP4) or 4.56 (NVFP4) an element, against reading (quantise) or memcpy, read and
written bytes together (dequantise). Before anything is timed, codes, scales and values are compared with mrgptq.reference.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import numpy as np
from bounds import Cold, library
from timing import absent, interleaved, records

import mrgptq as mg
from mrgptq import _core, reference

GROUP = {"nvfp4": 16, "mxfp4": 32}
DIVISOR = {("nvfp4", "absmax"): 3000.0, ("nvfp4", "mse"): 3000.0, ("nvfp4", "fpquant_mse"): 3000.0, ("mxfp4", "four-thirds"): 3.0}
WORKS = [(format, scales) for format in ("mxfp4", "nvfp4") for scales in (("even", "floor", "four-thirds") if format == "mxfp4" else ("absmax",)) + ("mse", "fpquant_mse")]


def bytes_of(format):
    """Bytes an element: float32, half a byte of code, its share of a scale."""
    return 4 + 0.5 + 1 / GROUP[format]


def check(format, scales):
    """Compare the core with the reference on a small matrix: end here where they differ."""
    w = (np.random.default_rng(1).standard_t(4, (32, 544)) * 0.02).astype(np.float32)
    search, rule = ("absmax", scales) if scales in mg.MX_RULES else (scales, "even")
    divisor = DIVISOR.get((format, scales), 1.0)
    codes, found, position = _core.quantize(format, search, rule, False, w, 0, divisor, 1)
    expected, expected_scales, _ = reference.quantize(w, format, search, rule, divisor)
    if position != -1 or not (np.array_equal(codes, reference.pack(expected)) and np.array_equal(found, expected_scales)):
        raise SystemExit(f"{format} {scales}: other bytes than the reference's")
    if not np.array_equal(_core.dequantize(format, codes, found, divisor, 1), reference.dequantize(expected, expected_scales, format, divisor)):
        raise SystemExit(f"{format} {scales}: other values than the reference's")


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
    packed, values = np.zeros(rows * row_bytes, np.uint8), np.empty((rows, cols), np.float32)
    pool, cuts = ThreadPoolExecutor(threads), [rows * t // threads for t in range(threads + 1)]

    def each(work):
        list(pool.map(lambda t: work(cuts[t], cuts[t + 1]), range(threads)))

    def forth():
        w = cold.next()
        each(lambda begin, end: quantize(w.ctypes.data + 4 * begin * cols, packed.ctypes.data + begin * row_bytes, end - begin, cols, None))

    def back():
        each(lambda begin, end: dequantize(packed.ctypes.data + begin * row_bytes, values.ctypes.data + 4 * begin * cols, (end - begin) * cols))

    forth()
    back()
    error = float(np.square(values - cold.matrices[0]).sum() / np.square(cold.matrices[0]).sum())
    if not error < 0.03:
        raise SystemExit(f"ggml's {format} loses {error:.3g} of the energy: it was called wrongly")
    return forth, back


def measure(threads: int, quick: bool, compare: bool, ggml: Path | None = None) -> list[dict]:
    """Records of every format and rule; ``ggml``: the folder of its libraries."""
    rows, cols = (64, 1024) if quick else (4096, 4096)
    cold = Cold(rows, cols, quick)
    target, elements, bound = np.empty((rows, cols), np.float32), rows * cols, library()
    for format, scales in WORKS:
        check(format, scales)

    found = []
    for format in GROUP:
        each = bytes_of(format)
        calls = {"bound: read": lambda: bound.bound_sum(cold.next(), elements, threads), "bound: memcpy": lambda: bound.bound_copy(target, cold.next(), elements, threads)}
        amount = {"bound: read": 4 / each * elements / 1e9, "bound: memcpy": 8 / each * elements / 1e9}
        against = {}
        for _, scales in (work for work in WORKS if work[0] == format):
            search, rule = ("absmax", scales) if scales in mg.MX_RULES else (scales, "even")
            divisor = DIVISOR.get((format, scales), 1.0)
            name = f"quantise {scales}"
            calls[name] = lambda search=search, rule=rule, divisor=divisor: _core.quantize(format, search, rule, False, cold.next(), 0, divisor, threads)
            against[name] = ("bound: read", "ggml quantise")
        block = GROUP[format]
        plain = "absmax" if format == "nvfp4" else "even"
        divisor = DIVISOR.get((format, plain), 1.0)
        calls["rotate + quantise, one pass"] = lambda: _core.quantize(format, "absmax", "even", False, cold.next(), block, divisor, threads)
        against["rotate + quantise, one pass"] = (f"quantise {plain}",)
        if format == "nvfp4":
            calls["amax + quantise absmax"] = lambda: (_core.amax(cold.next(), 0, threads), calls["quantise absmax"]())
            against["amax + quantise absmax"] = ("bound: read",)
        calls["round to the grid"] = lambda: _core.round_to_grid(format, "absmax", "even", False, cold.next(), 0, divisor, target, threads)
        against["round to the grid"] = ("bound: memcpy",)
        codes, scales, _ = _core.quantize(format, "absmax", "even", False, cold.matrices[0], 0, divisor, threads)
        stored = [(codes.copy(), scales.copy()) for _ in range(2 if quick else 4)]
        turn = cycle(stored)
        calls["dequantise"] = lambda turn=turn, divisor=divisor: _core.dequantize_into(format, *next(turn), divisor, target, threads)
        against["dequantise"] = ("bound: memcpy", "ggml dequantise")
        if compare and ggml and (peer := ggml_calls(ggml, format, cold, threads)):
            calls["ggml quantise"], calls["ggml dequantise"] = peer
        elif compare:
            found.append(absent("codecs", format, "ggml quantise", f"{rows} × {cols}", "Gelt/s", threads, f"no ggml with {format}: pass --ggml"))
        timings = interleaved(calls, budget=0.01 if quick else 1.5)
        found += records("codecs", format, f"{rows} × {cols}", "Gelt/s", threads, timings, amount={name: amount.get(name, elements / 1e9) for name in calls}, against=against)
    return found
