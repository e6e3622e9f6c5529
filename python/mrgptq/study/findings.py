"""All numbers of the study's page: what formats lose on model distributions and on a model's own weights, with and without rotations."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..rotations import Hadamard
from ..transforms import TRANSFORMS
from .analysis import Crossover, Errors, Mean, crossover, expected_error, preserved_mass, simulate, simulate_transform
from .distributions import Distribution, Laplace, Normal, StudentT
from .grids import E2M1, FORMATS, INT4, StudyFormat
from .weights import WeightRow, measurable, weight_rows

if TYPE_CHECKING:  # what it comes from imports torch, which the rest of the study does without
    from .methods import GridRow

Progress = Callable[[str, int, int], None]
SIZES = (4, 8, 16, 32, 64, 128)
RULES = {
    "MXFP4 floor": StudyFormat(E2M1, 32, "floor"),
    "MXFP4 ceil": StudyFormat(E2M1, 32, "ceil"),
    "MXFP4 even": StudyFormat(E2M1, 32, "even"),
    "MXFP4 four-thirds": StudyFormat(E2M1, 32, "four-thirds"),
    "MXFP4 mse": StudyFormat(E2M1, 32, "even", "mse"),
    "NVFP4 absmax": FORMATS["nvfp4"],
    "NVFP4 four_over_six": StudyFormat(E2M1, 16, "e4m3", "four_over_six"),
    "NVFP4 mse": StudyFormat(E2M1, 16, "e4m3", "mse"),
    "FP4, 32, real scale": StudyFormat(E2M1, 32, "real"),
    "FP4, 16, real scale": StudyFormat(E2M1, 16, "real"),
    "INT4, 32, float16": FORMATS["int4"],
    "NVINT4": FORMATS["nvint4"],
    "MXINT4": FORMATS["mxint4"],
}
"""By the name that tables give it: what is compared."""
GROUP_KURTOSIS = {"Normal": 3 * 32 / 34, "Laplace": 4.58}
"""Expected kurtosis of 32 independent values over their own mean square, which shortens tails: of the whole distributions it is 3 and 6. Normal: 3 n / (n + 2); Laplace: by Monte Carlo."""


@dataclass(frozen=True)
class RuleRow:
    """A format's errors: on Laplace values as they are and under a Hadamard over the group, and on Normal ones. ``expected``: the absolute error on Laplace values by an integral, None where there is none."""

    label: str
    format: StudyFormat
    laplace: Errors
    rotated: Errors
    normal: Errors
    expected: float | None


@dataclass(frozen=True)
class TransformRow:
    """Relative errors of Laplace values under one family of rotations, by format's name; of a random family over eight of its matrices."""

    name: str
    errors: dict[str, Mean]


@dataclass(frozen=True)
class Findings:
    """What the page shows.

    Attributes
    ----------
    values : drawn for each number, from ``seed``. rules, transforms : rows of tables. crossovers : {scale type: rows by group size} of E2M1 on Laplace values. tails : {distribution's name: {format's name: (plain, rotated)}}.
    mass : {element grid: [(group size, Laplace, Normal)]}, lemma 2's preserved mass.
    model : the folder, None without one. layers : of the model. left_out : {layer: why it is not among them}. methods : what each method costs it, the unquantised model's row first; empty where it was not measured.
    """

    values: int
    seed: int
    rules: list[RuleRow]
    transforms: list[TransformRow]
    crossovers: dict[str, list[Crossover]]
    tails: dict[str, dict[str, tuple[Mean, Mean]]]
    mass: dict[str, list[tuple[int, float, float]]]
    model: str | None = None
    layers: list[WeightRow] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    methods: "list[GridRow]" = field(default_factory=list)


def collect(model: str | os.PathLike[str] | None = None, *, values: int = 1 << 21, seed: int = 0, threads: int | None = None, progress: Progress | None = None) -> Findings:
    """Draw, integrate and measure.

    Parameters
    ----------
    model : folder whose linear layers' weights are measured, too. values : drawn for each number; standard errors go with its root. threads : the core's, for the model. progress : called as progress(what was done, done, total) after each.

    Raises
    ------
    FileNotFoundError, ValueError : no checkpoint, one without linear layers that groups of 32 divide, or with a weight that is not finite, by name; fewer than 1024 values.
    """
    if values < 1024:
        raise ValueError(f"values is {values}; means and their standard errors want 1024 or more")
    names, left_out = ([], {}) if model is None else measurable(model)
    total, done = len(RULES) + len(TRANSFORMS) + 3 + 4 + len(names), 0

    def say(what: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(what, done, total)

    rules = []
    for label, format in RULES.items():
        cases = ((Laplace(), None), (Laplace(), Hadamard(format.group_size)), (Normal(), None))
        laplace, rotated, normal = (simulate(format, distribution, rotation, values=values, seed=seed) for distribution, rotation in cases)
        closed = format.search == "absmax" and format.scale != "e4m3"
        rules.append(RuleRow(label, format, laplace, rotated, normal, expected_error(format, Laplace())[0] if closed else None))
        say(label)
    transforms = []
    for name in TRANSFORMS:
        transforms.append(TransformRow(name, {key: simulate_transform(FORMATS[key], Laplace(), name, values=values, seed=seed) for key in ("mxfp4", "nvfp4", "int4")}))
        say(f"rotation {name}")
    crossovers = {}
    for scale in ("e4m3", "even", "real"):
        crossovers[scale] = list(crossover(StudyFormat(E2M1, 16, scale), SIZES, values=values, seed=seed))
        say(f"group sizes, scale {scale}")
    tails: dict[str, dict[str, tuple[Mean, Mean]]] = {}
    for distribution in (Normal(), Laplace(), StudentT(5), StudentT(3)):
        tails[distribution.name] = {key: _both(FORMATS[key], distribution, values, seed) for key in ("mxfp4", "nvfp4", "int4")}
        say(distribution.name)
    mass = {grid.name: [(size, preserved_mass(grid, size, Laplace()), preserved_mass(grid, size, Normal())) for size in (2, *SIZES, 256, 1024)] for grid in (E2M1, INT4)}
    layers: list[WeightRow] = []
    for name, row in zip(names, weight_rows(model, names, threads=threads) if model is not None else (), strict=True):
        if row is None:
            left_out[name] = "it is zero"
        else:
            layers.append(row)
        say(name)
    return Findings(values, seed, rules, transforms, crossovers, tails, mass, None if model is None else os.fspath(model), layers, left_out)


def _both(format: StudyFormat, distribution: Distribution, values: int, seed: int) -> tuple[Mean, Mean]:
    plain, rotated = (simulate(format, distribution, rotation, values=values, seed=seed).mse for rotation in (None, Hadamard(format.group_size)))
    return plain, rotated
