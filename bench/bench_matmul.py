"""Products with packed weights, DRAM-cold, for 1 to 512 tokens, against NumPy's and torch's with the same weight unpacked, and ggml's; run by run.py.

Rates count 2 tokens rows cols operations. The packed weight and the peers' dense ones are each read from copies that together are four times the last-level cache. "bound: read" is what reading
the packed weight once would take, "bound: FMA" the machine's fused multiply-adds in float32. W4A4 and int8 are given float32 tokens too, and their time has the rounding in it. "prepacked": of the same weight in the order of ``mg.prepack``, as ggml's repacked ones are.
"""

from importlib.util import find_spec
from itertools import cycle
from pathlib import Path

import bounds
import numpy as np
from bounds import cold_bytes
from ggml_products import TYPES, Ggml
from timing import absent, agree, interleaved, records

import mrgptq as mg
from mrgptq import _core, reference

ROOM = "matmul"
TOKENS = (1, 2, 4, 16, 64, 256, 512)
NUMPY, TORCH = "NumPy x @ W.T", "torch, float32"
TORCH_BF16 = "torch, bfloat16"
OURS = ("W4A16", "W4A4", "int8")
MAKERS = {"": lambda q: (q.format, q.codes.copy(), q.scales.copy(), q.tensor_scale), ", prepacked": lambda q: mg.prepack(q).core_arrays()}
FORMS = tuple(MAKERS)
PEERS = {"W4A16": (NUMPY, TORCH, TORCH_BF16, "ggml F16", "ggml MXFP4 repacked", "ggml NVFP4"), "W4A4": (NUMPY, TORCH, TORCH_BF16, *TYPES), "int8": (NUMPY, TORCH, TORCH_BF16, "ggml Q4_0 repacked", "ggml MXFP4 repacked", "ggml NVFP4")}


def copies(make, nbytes, quick):
    """An endless turn of as many copies as are together four times the last-level cache."""
    return cycle([make() for _ in range(max(1, -(-cold_bytes(quick) // nbytes)))]).__next__


def product(kind, format, x, weight, out, threads):
    """``out``, the product of float32 tokens as ``mg.matmul`` composes it."""
    if kind != "W4A4":
        (_core.matmul if kind == "W4A16" else _core.matmul_int8)(x, weight, out, threads)
        return out
    divisor = _core.nvfp4_tensor_scale(_core.amax(x, 0, threads)) if format == "nvfp4" else 1.0
    codes, scales, _ = _core.quantize(format, "absmax", "even", False, x, 0, divisor, threads)
    _core.matmul_packed((format, codes, scales, divisor), weight, out, threads)
    return out


def rounded(kind, format, x):
    """float64 values of what the definition rounds tokens to: not at all, to the format's codes, or to eight bits with a step for each group."""
    if kind == "W4A16":
        return x.astype(np.float64)
    if kind == "W4A4":
        codes, scales, divisor = reference.quantize(x, format)
        return reference.dequantize(codes, scales, format, divisor).astype(np.float64)
    groups = x.reshape(len(x), -1, mg.FORMATS[format].group_size)
    steps = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    return (np.clip(np.rint(groups / steps), -127, 127) * steps.astype(np.float64)).reshape(x.shape)


# Of 288 columns: 40 + 3 roundings (mg.matmul), and at most 18 groups and one rounding of the answer, three with eight bits; of either operand's values, the step's and their own.
ROUNDINGS = {"W4A16": 43, "W4A4": 1.01 * (18 + 1 + 4), "int8": 1.01 * (18 + 3 + 2)}


def check(counts, threads):
    """Every product against float64 on a small problem, for these numbers of tokens; the measurement ends here where they differ by more than float32 explains."""
    rng = np.random.default_rng(3)
    for format in mg.FORMATS:
        codes, scales, divisor = reference.quantize(rng.standard_normal((70, 288), dtype=np.float32), format)
        q, w = mg.QuantizedMatrix(format, reference.pack(codes), scales, float(divisor)), reference.dequantize(codes, scales, format, divisor).astype(np.float64)
        for tokens in counts:
            x = rng.standard_normal((tokens, 288), dtype=np.float32)
            for kind, roundings in ROUNDINGS.items():
                values = rounded(kind, format, x)
                for form, make in MAKERS.items():
                    out = product(kind, format, x, make(q), np.full((tokens, 70), np.nan, np.float32), threads)
                    if not (np.abs(out - values @ w.T) <= roundings * 2.0**-24 * (np.abs(values) @ np.abs(w).T)).all():
                        raise SystemExit(f"the product {kind} of {tokens} tokens with {format}{form} is not that of its values: the measurement is worth nothing")


def measure(threads: int, quick: bool, compare: bool, ggml: Path | None = None) -> list[dict]:
    """Records of both formats and their peers for every number of tokens; ``ggml``: the folder of its libraries."""
    counts = (1, 9) if quick else TOKENS
    check(counts, threads)
    rows, cols = (64, 256) if quick else (4096, 14336)
    rng = np.random.default_rng(0)
    weight = rng.standard_t(5, (rows, cols)).astype(np.float32) * np.float32(0.02)
    packed = {format: mg.quantize(weight, format, threads=threads) for format in mg.FORMATS}
    turns = {format + form: copies(lambda q=q, make=make: make(q), q.nbytes, quick) for format, q in packed.items() for form, make in MAKERS.items()}
    dense = packed["nvfp4"].dequantize(threads=threads)
    torch_turns, found = {}, []
    if compare:
        numpy_turn = copies(dense.copy, dense.nbytes, quick)
    if compare and find_spec("torch"):
        import torch

        torch.set_num_threads(threads)
        torch_turns = {TORCH: (torch.float32, copies(lambda: torch.from_numpy(dense).clone(), dense.nbytes, quick)), TORCH_BF16: (torch.bfloat16, copies(lambda: torch.from_numpy(dense).to(torch.bfloat16), dense.nbytes // 2, quick))}
    peer, peer_weights = Ggml(ggml, threads) if compare and ggml else None, {}
    for name in TYPES if peer else ():
        if (tensors := peer.weights(name, weight, max(1, -(-cold_bytes(quick) // (dense.nbytes // (2 if name == "ggml F16" else 8)))))) is not None:
            peer_weights[name] = tensors
    peak, reading = bounds.bound("FMA float32", threads, quick), bounds.bound("read", threads, quick)
    for tokens in counts:
        x, amount = rng.standard_normal((tokens, cols), dtype=np.float32), 2 * tokens * rows * cols / 1e9
        outs = {(kind, format): np.empty((tokens, rows), np.float32) for kind in OURS for format in turns}
        calls = {
            f"{kind} {format}": lambda kind=kind, format=format: product(kind, format.split(",")[0], x, turns[format](), outs[kind, format], threads) for kind in OURS for format in turns
        }
        answers = {}
        if compare:
            calls[NUMPY] = lambda: answers.update(numpy=x @ numpy_turn().T)
        for name, (kind, turn) in torch_turns.items():
            tensor = torch.from_numpy(x).to(kind)
            calls[name] = lambda tensor=tensor, turn=turn: tensor @ turn().T
        peer_answers = {}
        for name, tensors in peer_weights.items():
            calls[name], peer_answers[name] = peer.product(tensors, x, rows)
        work, shape, unit = f"{tokens} token{'s' * (tokens > 1)}", f"{rows} × {cols}", "GFLOP/s"
        timings = interleaved(calls, quick=quick, budget=1.5, warm_up=True)
        for format in packed:  # energies: rounding adds one or two hundredths at four bits and less than a ten-thousandth at eight, and chance more in a few rows
            for kind, tolerance in (("W4A4", 0.2), ("int8", 0.02)):
                agree(f"the product {kind} {format}", float(np.square(outs[kind, format]).sum()), float(np.square(outs["W4A16", format]).sum()), tolerance)
        for kind in OURS:
            for format in packed:
                if outs[kind, format].tobytes() != outs[kind, format + FORMS[1]].tobytes():
                    raise SystemExit(f"the product {kind} with prepacked {format} is another: the measurement is worth nothing")
        if compare:
            agree("the product", float(np.square(outs["W4A16", "nvfp4"]).sum()), float(np.square(answers["numpy"]).sum()), 1e-4)
        for name, answer in peer_answers.items():  # as W4A4: what they round to four and to eight bits is the weight and the tokens
            agree(name, float(np.square(answer()).sum()), float(np.square(outs["W4A16", "nvfp4"]).sum()), 0.2)
        against = {f"{kind} {format}{form}": (*PEERS[kind], *([f"W4A16 {format}{form}"] if kind != "W4A16" else []), *([f"{kind} {format}"] if form else [])) for kind in OURS for format in packed for form in FORMS}
        found += records(ROOM, work, shape, unit, threads, timings, amount=amount, against=against, bound=("bound: FMA", peak))
        for row in found[-len(calls) :]:
            if row["contender"] in against:
                row["ratios"]["bound: read"] = row["median"] / (amount * reading / (packed[row["contender"].split()[1].rstrip(",")].nbytes / 1e9))
        if compare and not torch_turns:
            found.append(absent(ROOM, work, TORCH, shape, unit, threads, "torch is not installed"))
        for name in TYPES if compare and not quick else ():
            if name not in peer_weights:
                found.append(absent(ROOM, work, name, shape, unit, threads, "ggml or this processor lacks it" if peer else "no ggml: pass --ggml"))
    return found
