"""Hessian update, MR-GPTQ's solve and the recipe best, against the steps of FP-Quant in NumPy with SciPy and in torch; run by run.py.

A solve is given W, H and the scales: visiting order, factor, feedback, codes. The core is timed in both precisions, the peers work in float32. The recipe best is timed as
``quantize_layer`` runs it, scales, refinement and report included, without an output Hessian, and compared with the peer's plain MR-GPTQ.
"""

from collections import Counter
from dataclasses import replace
from functools import cache
from importlib.util import find_spec

import bounds
import numpy as np
import peers
from timing import absent, agree, interleaved, must_equal, records

import mrgptq as mg
from mrgptq import _core, reference

ROOM, FORMAT, GROUP, PRECISIONS = "gptq", "nvfp4", 16, ("float32", "float64")
SCIPY, TORCH = "FP-Quant's steps, SciPy", "FP-Quant's steps, torch"


def problem(rows, cols, seed=0, products=np.float32):
    """(weight float32, H float32 and float64, scale bytes, divisor, steps float32): correlated inputs of a trained network's kind, H of full rank, absmax scales. With products in float64 it is the
    same on every machine."""
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(5, (rows, cols)) * 0.02).astype(np.float32)
    directions = rng.standard_normal((cols, 256), dtype=np.float32) * rng.lognormal(0, 1, (cols, 1)).astype(np.float32) / 16
    h32 = np.matmul(directions, directions.T, dtype=products).astype(np.float32)
    h32[np.diag_indices(cols)] += rng.lognormal(-1, 1, cols).astype(np.float32)
    h32 = np.maximum(h32, h32.T)  # a BLAS may leave the halves an ulp apart
    q = mg.quantize(weight, FORMAT)
    steps = np.repeat(reference.steps_of(q.scales, FORMAT, np.float32(q.tensor_scale)), GROUP, axis=1)
    return weight, h32, h32.astype(np.float64), q.scales, q.tensor_scale, steps


def solve(weight, h, scales, divisor, precision, threads):
    """Codes by the core from W, H and scales."""
    factor = mg.Factor(h, order="activation", damping=0.01, precision=precision, threads=threads)
    if not factor.usable or factor.damping != 0.01:
        raise SystemExit("the benchmark's own Hessian could not be factorised: the measurement is worth nothing")
    return _core.solve(FORMAT, weight, 0, scales.copy(), divisor, factor.core, None, precision, False, "even", 0, threads)[0]


def best(weight, h, precision, threads):
    """The recipe best, of what ``quantize_layer`` is given here: no cross moment, no output Hessian."""
    return mg.quantize_layer(weight, h, replace(mg.Recipe.named("best", FORMAT), cross=0.0, output_hessian=None, precision=precision), threads=threads)


def check_hessian(threads):
    """The sum over two panels and a rest, every entry: 256 products in any order, and float64 beyond."""
    x = np.random.default_rng(3).standard_normal((700, 160), dtype=np.float32)
    h, wide = mg.Hessian(160), x.astype(np.float64)
    h._sum.update(x, threads)
    if not (np.abs(h.matrix - wide.T @ wide / 700) <= 257.1 * 2.0**-24 * (np.abs(wide).T @ np.abs(wide)) / 700).all():
        raise SystemExit("the core's H is not that of its inputs: the measurement is worth nothing")


@cache
def small():
    """A problem; by definition the codes of its solve, and codes, scales, divisor, the scales' offsets and the report's figures (the last of its ``damped_errors``) of the recipe best."""
    given = weight, _, h, _, _, steps = problem(48, 288, seed=1, products=np.float64)
    recipe = mg.Recipe.named("best", FORMAT)
    codes, scales, divisor, error, damping = reference.quantize_layer(weight, h, FORMAT, recipe.rotation, recipe.scales, recipe.mx_rule, recipe.order, recipe.damping, rounds=recipe.rounds)
    plain, plain_scales, _ = reference.quantize(weight, FORMAT, g=divisor)
    e, r = weight - reference.dequantize(codes, scales, FORMAT, divisor), reference.damped(h, damping)
    figures = {
        "relative_error": error,
        "rounded_error": reference.loss(weight - reference.dequantize(plain, plain_scales, FORMAT, divisor), h) / reference.loss(weight, h),
        "weight_error": float(np.square(e, dtype=np.float64).sum() / np.square(weight, dtype=np.float64).sum()),
        "damped_errors": reference.loss(e, r) / reference.loss(weight, r),
    }
    offsets = sorted(Counter((scales.astype(int) - plain_scales).ravel().tolist()).items())
    return given, reference.gptq_textbook(weight, h, steps, "activation"), (reference.pack(codes), scales, divisor, offsets), figures


def check_answers(threads):
    """The core's codes are reference.py's on a small problem in both precisions, the peers' loss is too: what is timed below does the same work."""
    (weight, h32, h64, scales, divisor, steps), codes, by_best, figures = small()
    for precision in PRECISIONS:
        must_equal(f"solve {precision}", [solve(weight, h64, scales, divisor, precision, threads)], [reference.pack(codes)])
        q = best(weight, h64, precision, threads)
        must_equal(f"best {precision}", (q.codes, q.scales, q.tensor_scale, sorted(q.report.scale_offsets.items())), by_best)
        for name, figure in figures.items():
            reported = getattr(q.report, name)
            agree(f"best {precision}, {name}", reported[-1] if name == "damped_errors" else reported, figure, 1e-5)
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
    timings = interleaved(contenders, quick=quick, budget=6.0)
    expected = np.einsum("ti,ti->i", x, x, dtype=np.float64) / tokens
    agree("the trace of the core's H", float(ours.matrix.diagonal().sum()), float(expected.sum()), 1e-5)
    against = {name: ("OpenBLAS ssyrk",) for name in contenders if name != "OpenBLAS ssyrk"}
    bound = ("SGEMM", bounds.bound("SGEMM", threads, quick))
    return records(ROOM, work, shape, unit, threads, timings, amount=tokens * cols * (cols + 1) / 1e9, against=against, bound=bound) + rows


def layer(rows, cols, threads, quick, compare, by_best):
    """MR-GPTQ's solve on one shape, or the recipe best on it; the peers solve in both."""
    weight, h32, h64, scales, divisor, steps = problem(rows, cols)
    shape, unit, work = f"{rows} × {cols}", "s", "recipe best" if by_best else "MR-GPTQ solve"
    calls = {}
    for precision in PRECISIONS:
        if by_best:
            calls[f"best {precision}"] = lambda precision=precision: best(weight, h64, precision, threads)
        else:
            calls[f"mrgptq {precision}"] = lambda precision=precision: solve(weight, h64, scales, divisor, precision, threads)
    missing = []
    if compare:
        calls[SCIPY] = lambda: peers.numpy_mr_gptq(weight, h32, steps)
        if not by_best and find_spec("torch"):
            calls[TORCH] = lambda: peers.torch_mr_gptq(weight, h32, steps)
        elif not by_best:
            missing.append(absent(ROOM, work, TORCH, shape, unit, threads, "torch is not installed"))
    answers = {}

    def keep(name):
        answers[name] = calls[name]()

    timings = interleaved({name: lambda name=name: keep(name) for name in calls}, quick=quick, budget=12.0, at_least=2 if by_best else 3, warm_up=quick)
    exact = _loss(weight, solve(weight, h64, scales, divisor, "float64", threads) if by_best else answers["mrgptq float64"], scales, divisor, h64, threads)
    for name, answer in answers.items():
        loss = _loss(weight, answer, scales, divisor, h64, threads)
        if not name.startswith("best"):
            agree(f"the loss of {name}", loss, exact, 2e-3)
        elif not loss < exact:
            raise SystemExit(f"{name} loses {loss:.6g}, plain MR-GPTQ {exact:.6g}: the measurement is worth nothing")
    rows_out = records(ROOM, work, shape, unit, threads, timings, against={name: (SCIPY,) for name in calls if name != SCIPY})
    if not by_best:
        for row in rows_out:  # the operations that one factorisation needs, whoever does more of them
            row["gflops"] = (cols**3 / 3 + rows * cols**2) / 1e9 / row["median"]
    return rows_out + missing


def _loss(weight, answer, scales, divisor, h, threads):
    """tr(E H E^T) of packed codes, of a QuantizedMatrix or of values."""
    if isinstance(answer, mg.QuantizedMatrix):
        answer = answer.dequantize(threads=threads)
    elif answer.dtype == np.uint8:
        answer = _core.dequantize(FORMAT, answer, scales, divisor, threads)
    return _core.quadratic_forms(weight - answer, 0, [], _core.SecondMoment(h), "float64", threads)[0]


def measure(threads: int, quick: bool, compare: bool, large: bool = False) -> list[dict]:
    """Records of the room; ``large`` adds the widest shape, which takes minutes and 8 GB."""
    if compare and find_spec("torch"):
        import torch

        torch.set_num_threads(threads)
    check_hessian(threads)
    check_answers(threads)
    rows = hessian_update(threads, quick, compare)
    for shape in [(64, 256)] if quick else [(4096, 4096), (14336, 4096), *([(4096, 14336)] if large else [])]:
        rows += layer(*shape, threads, quick, compare, by_best=False)
    return rows + layer(*((64, 256) if quick else (4096, 4096)), threads, quick, compare, by_best=True)
