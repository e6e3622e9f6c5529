"""Times contenders in turns and says it as records, the form in which every bench_<room>.py answers run.py.

A record is a dict: room, work, contender, shape, unit, median, low, high, threads, calls; ``ratios``, {other: how many times as fast as that contender or bound of the same run}. A contender that could not run has the median None and a ``note`` that says why.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender's calls."""

    seconds: tuple[float, ...]

    def values(self, amount: float | None) -> tuple[float, float, float]:
        """(median, low, high): seconds where ``amount`` is None, else the rate amount / seconds."""
        values = sorted(self.seconds if amount is None else (amount / s for s in self.seconds))
        return median(values), values[0], values[-1]


def interleaved(contenders: Mapping[str, Callable[[], object]], *, quick: bool = False, budget: float = 4.0, at_least: int = 3, at_most: int = 25, warm_up: bool = True) -> dict[str, Timing]:
    """One call of each to warm up (what takes seconds can do without), then rounds in which each is called once, the order turned by one from round to round.

    Rounds end after ``at_most``, or where the next would pass ``budget`` seconds for each contender, but not before ``at_least``. Before each call stands a pause: the threads of another
    contender's BLAS spin for a while after their work and would take the core. ``quick`` shows that everything runs: ``at_least`` rounds, no pauses.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    spent = 0.0
    for name in names if warm_up else ():
        contenders[name]()
    for done in range(at_most):
        if done >= at_least and (quick or spent * (done + 1) / done > budget * len(names)):
            break
        start = time.perf_counter()
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(0 if quick else 0.03)
            begin = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - begin)
            if seconds[name][-1] > 1:  # somebody waits for it
                print(f"         {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
        spent += time.perf_counter() - start
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def records(
    room: str,
    work: str,
    shape: str,
    unit: str,
    threads: int,
    timings: Mapping[str, Timing],
    *,
    amount: float | Mapping[str, float] | None = None,
    against: Mapping[str, Sequence[str]] | None = None,
    bound: tuple[str, float] | None = None,
) -> list[dict]:
    """Records of one interleaved measurement.

    ``amount`` is what one call does, in units (GB, GFLOP), by contender where they differ; None where the unit is seconds. ``against`` names the contenders that one is compared with, those
    of them that ran; ``bound`` (name, rate) is compared with all.
    """
    rows = []
    values = {name: timing.values(amount[name] if isinstance(amount, Mapping) else amount) for name, timing in timings.items()}
    for name, (middle, low, high) in values.items():
        row = {"room": room, "work": work, "contender": name, "shape": shape, "unit": unit, "median": middle, "low": low, "high": high, "threads": threads, "calls": len(timings[name].seconds)}
        others = {other: values[other][0] for other in (against or {}).get(name, ()) if other in values} | dict([bound] if bound else [])
        row["ratios"] = {other: rate / middle if amount is None else middle / rate for other, rate in others.items()}
        rows.append(row)
    return rows


def absent(room: str, work: str, contender: str, shape: str, unit: str, threads: int, note: str) -> dict:
    """The record of a peer that could not run here; ``note`` says why."""
    return {"room": room, "work": work, "contender": contender, "shape": shape, "unit": unit, "median": None, "low": None, "high": None, "threads": threads, "note": note}


def agree(what: str, value: float, expected: float, tolerance: float) -> None:
    """End the benchmark where an answer is not what it should be: a fast wrong answer is no result. Written so that NaN fails."""
    if not abs(value - expected) <= tolerance * abs(expected):
        raise SystemExit(f"{what} is {value:.9g}, expected {expected:.9g} within {tolerance:g} of it: the measurement is worth nothing")


def must_equal(what: str, answer: Iterable[ArrayLike], definition: Iterable[ArrayLike]) -> None:
    """End the benchmark where arrays are not the definition's to the last bit."""
    if not all(np.array_equal(mine, its) for mine, its in zip(answer, definition, strict=True)):
        raise SystemExit(f"{what}: another answer than the definition's, mrgptq.reference: the measurement is worth nothing")
