"""Hessian update, MR-GPTQ's solve and the recipe best, against the steps of FP-Quant in NumPy with SciPy and in torch; run by run.py.

A solve is given W, H and the scales: visiting order, factor, feedback, codes. The core is timed in both precisions, the peers work in float32. The recipe best is timed as
``quantize_layer`` runs it, scales, refinement and report included, without an output Hessian, and compared with the peer's plain MR-GPTQ.
"""

from dataclasses import replace
from importlib.util import find_spec

import bounds
import numpy as np
import peers
from timing import absent, agree, interleaved, records

import mrgptq as mg
from mrgptq import _core, reference

ROOM, FORMAT, GROUP = "gptq", "nvfp4", 16
SCIPY, TORCH = "FP-Quant's steps, SciPy", "FP-Quant's steps, torch"


def problem(rows, cols, seed=0):
    """(weight float32, H float32 and float64, scale bytes, divisor, steps float32): correlated inputs of a trained network's kind, H of full rank, absmax scales."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(5, (rows, cols)) * 0.02).astype(np.float32)
    directions = rng.standard_normal((cols, 256), dtype=np.float32) * rng.lognormal(0, 1, (cols, 1)).astype(np.float32) / 16
    h32 = directions @ directions.T
    h32[np.diag_indices(cols)] += rng.lognormal(-1, 1, cols).astype(np.float32)
    h32 = np.maximum(h32, h32.T)  # a BLAS may leave the halves an ulp apart
    q = mg.quantize(weight, FORMAT)
    steps = np.repeat(reference.steps_of(q.scales, FORMAT, np.float32(q.tensor_scale)), GROUP, axis=1)
    return weight, h32, h32.astype(np.float64), q.scales, q.tensor_scale, steps


def solve(weight, h, scales, divisor, precision, threads):
    """Codes by the core from W, H and scales."""
    factor = mg.Factor(h, order="activation", damping=0.01, threads=threads)
    if not factor.usable or factor.damping != 0.01:
        raise SystemExit("the benchmark's own Hessian could not be factorised: the measurement is worth nothing")
    return _core.solve(FORMAT, weight, scales.copy(), divisor, factor.core, None, precision, False, "even", 0, threads)[0]


def check_answers(threads):
    """The core's codes are reference.py's on a small problem, the peers' loss is too: what is timed below does the same work."""
    weight, h32, h64, scales, divisor, steps = problem(48, 288, seed=1)
    codes = reference.gptq_textbook(weight, h64, steps, "activation")
    if not np.array_equal(mg.unpack(solve(weight, h64, scales, divisor, "float64", threads)), codes):
        raise SystemExit("the core's codes are not reference.py's: the measurement is worth nothing")
    expected = reference.loss(weight - steps * reference.decode_e2m1(codes), h64)
    for name, peer in ((SCIPY, peers.numpy_mr_gptq), *([(TORCH, peers.torch_mr_gptq)] if find_spec("torch") else [])):
        agree(f"the loss of {name}", reference.loss(weight - peer(weight, h32, steps), h64), expected, 2e-3)


def hessian_update(threads, quick, compare):
    """H += X^T X over 8192 tokens of 4096 columns, the symmetric half counted."""
    tokens, cols = (256, 256) if quick else (8192, 4096)
    x = np.random.default_rng(2).standard_normal((tokens, cols), dtype=np.float32)
    ours, theirs = mg.Hessian(cols), np.zeros((cols, cols), np.float32, order="F")
    contenders = {"mrgptq": lambda: ours._sum.update(x, threads)}
    if compare:
        contenders["OpenBLAS ssyrk"] = lambda: peers.ssyrk(x, theirs)
        contenders["NumPy X.T @ X"] = lambda: x.T @ x
    work, shape, unit = "Hessian update", f"{tokens} × {cols}", "GFLOP/s"
    rows = []
    if compare and find_spec("torch"):
        import torch

        tensor, torch_sum = torch.from_numpy(x), torch.zeros(cols, cols)
        contenders["torch addmm"] = lambda: torch_sum.addmm_(tensor.T, tensor)
    elif compare:
        rows.append(absent(ROOM, work, "torch addmm", shape, unit, threads, "torch is not installed"))
    timings = interleaved(contenders, budget=0.1 if quick else 6.0)
    expected = np.einsum("ti,ti->i", x, x, dtype=np.float64) / tokens
    agree("the trace of the core's H", float(ours.matrix.diagonal().sum()), float(expected.sum()), 1e-5)
    bound = ("SGEMM", bounds.bound("SGEMM", threads, quick))
    return records(ROOM, work, shape, unit, threads, timings, amount=tokens * cols * (cols + 1) / 1e9, ratio_to="OpenBLAS ssyrk", bound=bound) + rows


def solves(rows, cols, threads, quick, compare, best):
    """MR-GPTQ's solve, and where asked the recipe best, on one shape."""
    weight, h32, h64, scales, divisor, steps = problem(rows, cols)
    answers = {}

    def keep(name, call):
        def run():
            answers[name] = call()

        return run

    contenders = {f"mrgptq {precision}": keep(precision, lambda precision=precision: solve(weight, h64, scales, divisor, precision, threads)) for precision in ("float32", "float64")}
    recipe = replace(mg.Recipe.named("best", FORMAT), cross=0.0, output_hessian=None)
    if best:
        for precision in ("float32", "float64"):
            contenders[f"best {precision}"] = keep(f"best {precision}", lambda precision=precision: mg.quantize_layer(weight, h64, replace(recipe, precision=precision), threads=threads))
    note = None
    if compare:
        contenders[SCIPY] = keep(SCIPY, lambda: peers.numpy_mr_gptq(weight, h32, steps))
        if find_spec("torch"):
            contenders[TORCH] = keep(TORCH, lambda: peers.torch_mr_gptq(weight, h32, steps))
        else:
            note = "torch is not installed"
    timings = interleaved(contenders, budget=0.1 if quick else 12.0)
    losses = {}
    for name, answer in answers.items():
        if isinstance(answer, mg.QuantizedMatrix):
            answer = answer.dequantize(threads=threads)
        elif answer.dtype == np.uint8:
            answer = _core.dequantize(FORMAT, answer, scales, divisor, threads)
        losses[name] = _core.quadratic_form(weight - answer, h64, threads)
    for name, loss in losses.items():
        if name.startswith("best"):
            if not loss < losses["float64"]:
                raise SystemExit(f"{name} loses {loss:.6g}, plain MR-GPTQ {losses['float64']:.6g}: the measurement is worth nothing")
        else:
            agree(f"the loss of {name}", loss, losses["float64"], 2e-3)
    shape, unit = f"{rows} × {cols}", "s"
    solved = {name: timing for name, timing in timings.items() if not name.startswith("best")}
    result = records(ROOM, "MR-GPTQ solve", shape, unit, threads, solved, ratio_to=SCIPY)
    if note:
        result.append(absent(ROOM, "MR-GPTQ solve", TORCH, shape, unit, threads, note))
    if best:
        with_peer = {name: timing for name, timing in timings.items() if name.startswith("best") or name == SCIPY}
        result += [row for row in records(ROOM, "recipe best", shape, unit, threads, with_peer, ratio_to=SCIPY) if row["contender"] != SCIPY]
    for row in result:
        # The operations that one factorisation needs, whoever does more of them.
        if row["work"] == "MR-GPTQ solve" and row["median"]:
            row["gflops"] = (cols**3 / 3 + rows * cols**2) / 1e9 / row["median"]
    return result


def measure(threads: int, quick: bool, compare: bool, large: bool = False) -> list[dict]:
    """Records of the room; ``large`` adds the widest shape, which takes minutes and 8 GB."""
    if compare and find_spec("torch"):
        import torch

        torch.set_num_threads(threads)
    check_answers(threads)
    rows = hessian_update(threads, quick, compare)
    for shape in [(64, 256)] if quick else [(4096, 4096), (14336, 4096), *([(4096, 14336)] if large else [])]:
        rows += solves(*shape, threads, quick, compare, best=shape[0] == shape[1] or quick)
    return rows
