"""The benchmarks themselves: an answer that is wrong is never timed."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from mrgptq import _core

BENCH = Path(__file__).parent.parent / "bench"


def key_of(name, arguments):
    """What tells one timed call of the core from another: its function, names and whole numbers, whether it works in place, the form of a packed matrix, and of a product how many tokens it has."""
    product = name.startswith("matmul")

    def described(i, argument):
        if isinstance(argument, np.ndarray):
            return any(argument is other for other in arguments[:i]), len(argument) if product and i == 0 else None
        if isinstance(argument, tuple):
            return argument[0], len(argument), len(argument[1]) if product and i == 0 else None
        return argument if isinstance(argument, str | int) else None

    return repr((name, [described(i, argument) for i, argument in enumerate(arguments)]))


def with_code(codes):
    codes[-1, -1] ^= 1


def with_value(values):
    values[-1, -1] += 0.001 * np.abs(values).max()


def with_diagonal(matrix):
    matrix[0, 0] *= 2


# How a call goes wrong, from its arguments and its answer: another answer, or None where what it has written is another.
FAULTS = {
    "amax": lambda arguments, answer: 1.001 * answer,
    "nvfp4_tensor_scale": lambda arguments, answer: 1.001 * answer,
    "quantize": lambda arguments, answer: with_code(answer[0]),
    "find_scales": lambda arguments, answer: with_code(answer),
    "round_to_grid": lambda arguments, answer: with_value(arguments[7]),
    "dequantize_into": lambda arguments, answer: with_value(arguments[4]),
    "rotate_columns": lambda arguments, answer: with_value(arguments[2]),
    "matmul": lambda arguments, answer: with_value(arguments[2]),
    "matmul_packed": lambda arguments, answer: with_value(arguments[2]),
    "matmul_int8": lambda arguments, answer: with_value(arguments[2]),
    "make_symmetric": lambda arguments, answer: with_diagonal(arguments[1]),
    "CholeskyFactor": lambda arguments, answer: with_diagonal(arguments[0]),  # before the matrix is factorised
    "HessianSum.update": lambda arguments, answer: HESSIAN_SUM.update(arguments[0], arguments[1][:1], 1),  # a token twice
    "solve": lambda arguments, answer: with_code(answer[0]),
    "quadratic_forms": lambda arguments, answer: [*answer[:-1], 1.001 * answer[-1]],
    "square_sums": lambda arguments, answer: (1.001 * answer[0], answer[1]),
    "diagonal_form": lambda arguments, answer: 1.001 * answer,
}
HESSIAN_SUM = _core.HessianSum


def watch(monkeypatch, seen):
    """After each call of the core ``seen(name, arguments, answer)`` may say another answer."""
    for name, function in list(vars(_core).items()):
        if name in FAULTS and not isinstance(function, type):

            def watched(*arguments, name=name, function=function):
                answer = function(*arguments)
                other = seen(name, arguments, answer)
                return answer if other is None else other

            monkeypatch.setattr(_core, name, watched)

    class HessianSum(_core.HessianSum):
        def update(self, x, threads):
            super().update(x, threads)
            seen("HessianSum.update", (self, x, threads), None)

    class CholeskyFactor(_core.CholeskyFactor):
        def __init__(self, *arguments):
            seen("CholeskyFactor", arguments, None)
            super().__init__(*arguments)

    monkeypatch.setattr(_core, "HessianSum", HessianSum)
    monkeypatch.setattr(_core, "CholeskyFactor", CholeskyFactor)


@pytest.mark.parametrize("room", ["codecs", "gptq", "matmul", "rotations"])
def test_a_fault_in_anything_that_is_timed_ends_the_run_before(room, monkeypatch):
    """Every call of the core that the stopwatch would see goes wrong once, that call alone, however the same function is called elsewhere."""
    monkeypatch.syspath_prepend(str(BENCH))
    bench, timing = (importlib.import_module(name) for name in (f"bench_{room}", "timing"))
    timed, timing_now = {}, False

    def once_each(contenders, **_):
        nonlocal timing_now
        timing_now = True
        for call in contenders.values():
            call()
        timing_now = False
        return dict.fromkeys(contenders, timing.Timing((1.0,)))

    def note(name, arguments, _):
        if timing_now:
            timed[key_of(name, arguments)] = name

    with monkeypatch.context() as patch:
        patch.setattr(bench, "interleaved", once_each)
        watch(patch, note)
        bench.measure(1, True, False)
    assert len(timed) >= 8

    def too_late(contenders, **_):
        raise AssertionError("timed, though the answer is wrong")

    monkeypatch.setattr(bench, "interleaved", too_late)
    for key, spoiled in timed.items():
        with monkeypatch.context() as patch:
            watch(patch, lambda name, arguments, answer, key=key, spoiled=spoiled: FAULTS[name](arguments, answer) if name == spoiled and key_of(name, arguments) == key else None)
            with pytest.raises(SystemExit) as ended:
                bench.measure(1, True, False)
        assert len(str(ended.value).split()) > 5, key  # a sentence


def test_nothing_that_is_timed_escapes_the_faults():
    """What the benchmarks of the core name is in FAULTS, or is not timed."""
    named = {name for path in BENCH.glob("bench_*.py") for name in re.findall(r"_core\.(\w+)", path.read_text())}
    assert named - FAULTS.keys() == {"SecondMoment", "dequantize"}  # both only compare answers
