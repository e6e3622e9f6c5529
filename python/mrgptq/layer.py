"""One layer: composes rotation, scales, solver and report."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import _core
from .arrays import as_float32, as_square, as_symmetric, as_threads, pad_columns
from .codecs import (
    HESSIAN_SEARCHES,
    PackedMatrix,
    Turn,
    alternating_tensor_scale,
    clip_mask,
    nvfp4_tensor_scale,
    scale_offsets,
    scales_name,
    tensor_scale_for,
    turn_of,
    weight_error,
)
from .formats import SCALE_SEARCHES, block_format
from .gptq import OUTPUT_DAMPING, Factor, Hessian, output_errors
from .recipe import Recipe, as_recipe
from .result import Activations, LayerReport, QuantizedMatrix
from .rotations import Rotation, rotate_hessian


def make_factor(hessian: ArrayLike, recipe: Recipe | str, *, format: str | None = None, threads: int | None = None) -> Factor:
    """The :class:`Factor` that layers with one input share under a recipe: pass it to ``quantize_layer(..., factor=)``. The hessian is needed no longer, and left as it is."""
    recipe = as_recipe(recipe, format)
    given = as_square(hessian, None)
    padding, rotation = recipe.fit(given.cols if isinstance(given, Hessian) else len(given), "hessian")
    return Factor(_padded_moment(given, padding), rotation=rotation, order=recipe.order, damping=recipe.damping, group_size=_group_size(recipe), precision=recipe.precision, threads=threads)


def _padded_moment(hessian: Any, padding: int) -> Any:
    """The second moment of inputs with so many zeros behind them."""
    if not padding:
        return hessian
    return hessian.padded(padding) if isinstance(hessian, Hessian) else pad_columns(np.pad(hessian, ((0, padding), (0, 0))), padding)


def shared_tensor_scale(weights: Sequence[ArrayLike], recipe: Recipe, *, threads: int | None = None) -> float | None:
    """The NVFP4 divisor of layers that a kernel runs as one (q/k/v, gate/up), by the recipe's rule over their rotated weights (rows, cols); None for MXFP4, whose divisor is fixed."""
    if recipe.format != "nvfp4":
        return None
    if not len(weights):
        raise ValueError("weights is empty; there is no tensor scale to find")
    # Layers of one input are equally wide.
    padding, rotation = recipe.fit(as_float32(weights[0], "weights", rank=2, threads=threads).shape[1], "weights")
    if recipe.tensor_scale == "alternating":
        search = recipe.resolved_scales[0]
        return alternating_tensor_scale([pad_columns(weight, padding) for weight in weights], search if search in SCALE_SEARCHES["nvfp4"] else "mse", rotation=rotation, threads=threads)

    def largest(weight: ArrayLike) -> float:
        values = pad_columns(as_float32(weight, "weights", rank=2, threads=threads), padding)
        rotation.check_columns(values.shape[1], "weights")
        return _core.amax(values, turn_of(rotation), as_threads(threads))

    # One widened weight is held at a time. Of all of them, so that a zero matrix among them has no say.
    return nvfp4_tensor_scale(max(map(largest, weights)))


def _group_size(recipe: Recipe) -> int | None:
    return block_format(recipe.format).group_size if recipe.order == "group" else None


def _check_factor(factor: Factor, recipe: Recipe, cols: int, rotation: Rotation) -> None:
    if not isinstance(factor, Factor):
        raise TypeError(f"factor is {type(factor).__name__}; it must be what make_factor returned")
    asked = (cols, rotation, recipe.order, _group_size(recipe), recipe.damping)
    made = (factor.cols, factor.rotation, factor.order_name, factor.group_size, factor.damping_asked)
    for what, want, got in zip(("columns", "rotation", "order", "group_size", "damping"), asked, made, strict=True):
        if want != got:
            raise ValueError(f"factor was made with {what} {got}; the layer and its recipe need {want}")
    if recipe.precision == "float64" != factor.precision:
        raise ValueError(f"factor was made with precision {factor.precision}; the recipe needs float64, which serves recipes of float32 too")


def quantize_layer(
    weight: ArrayLike,
    hessian: ArrayLike | None,
    recipe: Recipe | str = "mr-gptq",
    *,
    format: str | None = None,
    tensor_scale: float | None = None,
    factor: Factor | None = None,
    cross: ArrayLike | None = None,
    stream: ArrayLike | None = None,
    output_hessian: ArrayLike | None = None,
    dtype: str | None = None,
    threads: int | None = None,
) -> QuantizedMatrix:
    """Quantise one linear layer's weight under its inputs' second moment.

    Parameters
    ----------
    weight : (rows, cols) array, rows = out_features, cols = in_features; float32 / float16 / bfloat16 / float64, finite, any strides.
    hessian : Hessian or (cols, cols) array, symmetric, in the original (not rotated) basis; any positive multiple of it gives the same codes.
        A Hessian that saw no token, as of an expert that the text did not reach, has the weight rounded plainly, and the report's ``fallback`` says so.
        None is allowed for the solver "rtn" with scales that do without, whose report then has no relative error, and where ``factor`` is given: then only its shape is looked at.
    recipe : Recipe, or a name ("rtn", "gptq", "mr-gptq", "best", "best-online") with ``format`` ("nvfp4" by default).
    tensor_scale : the NVFP4 divisor, where several layers share one (:func:`shared_tensor_scale`); None takes the recipe's own of the rotated weight.
    factor : what :func:`make_factor` made of the same Hessian and recipe, shared by layers with one input; one of precision float64 serves recipes of float32 too.
    cross : (cols, cols) array X^T X̃ / tokens for callers who have the inputs X of the original model beside the inputs X̃ that the quantised layer will see; ``hessian`` is then that
        of X̃. The solver's target becomes W + recipe.cross * W (cross - H)(H + λI)^-1, at 1 the unconstrained optimum that GPTAQ and Qronos approach; with X from the unquantised
        model that overfitted 65 000 tokens. The report's errors are still measured against W, under the hessian.
    stream : (rows, cols) array D^T X̃ / tokens beside ``cross``, for a layer whose outputs are added to something (the residual stream) that in the quantised model falls short of the original's
        by D, (tokens, rows): the layer then makes up for D too, and the target becomes W + recipe.cross * (W (cross - H) + stream)(H + λI)^-1. float32.
    output_hessian : Hessian or (rows, rows) array A, symmetric: the second moment of the loss's gradients at the layer's outputs, such as ``hf.collect_output_hessians`` gives. Then
        tr(A E H E^T) is made small instead of tr(E H E^T): rows, worked off in blocks by descending diagonal of A, make up for the errors of those before. Any positive multiple gives the
        same codes. None: outputs count alike.
    dtype : "bfloat16" where ``weight`` is bfloat16 bits held as uint16.
    threads : None follows OMP_NUM_THREADS. Same bytes for any number.

    Returns
    -------
    QuantizedMatrix : in the recipe's rotated basis, with its ``report``.

    Raises
    ------
    ValueError, TypeError : a full sentence that names the argument, what was given and what is allowed.

    References
    ----------
    Egiazarian et al. 2025 (arXiv 2509.23202), section 4; Frantar et al. 2022 (arXiv 2210.17323); the one-factor form after Chen et al. 2025 (arXiv 2507.18553);
    rounding by the second moments of both sides: Tseng et al. 2025 (arXiv 2505.22988).

    Examples
    --------
    >>> import numpy as np, mrgptq as mg
    >>> rng = np.random.default_rng(0)
    >>> w, x = rng.standard_normal((8, 64)), rng.standard_normal((256, 64))
    >>> q = mg.quantize_layer(w, x.T @ x, "mr-gptq", format="nvfp4")
    >>> q.codes.shape, q.scales.shape, q.report.method
    ((8, 32), (8, 4), 'gptq')
    """
    start = time.perf_counter()
    recipe = as_recipe(recipe, format)
    values = as_float32(weight, "weight", rank=2, dtype=dtype, threads=threads)
    cols = values.shape[1]
    padding, rotation = recipe.fit(cols)
    values = pad_columns(values, padding)

    second_moment: _core.SecondMoment | None = None
    tokens = None
    if recipe.solver == "gptq":
        if factor is None:
            if hessian is None:
                raise ValueError('hessian is None; only a recipe with the solver "rtn" does without')
            factor = make_factor(as_square(hessian, cols), recipe, threads=threads)
        elif hessian is not None:
            as_square(hessian, cols)
        _check_factor(factor, recipe, cols + padding, rotation)
        second_moment, tokens = factor.core.second_moment(), factor.tokens
    elif factor is not None:
        raise ValueError(f'factor is given, but the solver "{recipe.solver}" uses none; pass the hessian alone')
    elif hessian is not None:
        moment = _padded_moment(as_square(hessian, cols), padding)
        second_moment, tokens = _core.SecondMoment(rotate_hessian(rotation, moment, threads=threads)), getattr(hessian, "tokens", None)

    turn = turn_of(rotation)
    largest = _core.amax(values, turn, as_threads(threads))  # refuses what overflows when it is rotated
    outputs = None if output_hessian is None else _output_factor(output_hessian, values.shape[0], recipe, threads)
    search, rule = recipe.resolved_scales
    if tensor_scale is None and recipe.tensor_scale == "alternating":
        tensor_scale = shared_tensor_scale([values], recipe, threads=threads)
    divisor = tensor_scale_for(recipe.format, values, rule, tensor_scale, rotation=rotation, threads=threads)
    usable = factor is not None and factor.usable and tokens != 0
    target, target_turn = values, turn
    if cross is not None:
        target, target_turn = _shifted(values, turn, cross, stream, padding, recipe, factor, threads)
    elif stream is not None:
        raise ValueError("stream is given without cross; a layer makes up for what its outputs are added to only beside its inputs")
    if search in HESSIAN_SEARCHES and second_moment is None:
        raise ValueError(f'hessian is None; the scales "{search}" weigh errors by it')
    # Where no factor could be had there is no GPTQ to choose scales in; their plain counterpart is mse.
    first = search if search != "gptq" else "absmax" if usable else "mse"
    weights = _group_moments(second_moment, recipe) if search in HESSIAN_SEARCHES and second_moment is not None else None
    losses: list[float] = []
    method, fallback, precision = "rounding", None, None
    coupled = outputs.core if usable and outputs is not None and outputs.usable else None
    if factor is None or not usable:
        if factor is not None:
            why = "no token reached its inputs" if tokens == 0 else f"the Hessian could not be factorised, not even with damping {factor.damping:g}"
            fallback = f"rounded plainly, scales by {first}: {why}"
        if weights is None:
            codes, scales, _ = _core.quantize(recipe.format, first, rule, False, target, target_turn, divisor, as_threads(threads))
        else:
            scales = _core.find_scales(recipe.format, first, rule, target, target_turn, divisor, weights, as_threads(threads))
            codes = _core.encode(recipe.format, target, target_turn, scales, divisor, as_threads(threads))
    else:
        method, begin = "gptq", _core.find_scales(recipe.format, first, rule, target, target_turn, divisor, weights, as_threads(threads))
        asked = recipe.precision if search != "gptq" or _fits_float32(largest, factor) else "float64"
        for precision in dict.fromkeys((asked, "float64")):
            scales = begin.copy()
            codes, losses = _core.solve(recipe.format, target, target_turn, scales, divisor, factor.core, coupled, precision, search == "gptq", rule, recipe.rounds, as_threads(threads))
            if np.isfinite(losses).all():  # feedback may grow beyond float32 where neither weight nor H is
                break

    if outputs is not None and fallback is None:
        if not outputs.usable:
            fallback = f"outputs counted alike: the output Hessian could not be factorised, not even with damping {outputs.damping:g}"
        elif outputs.dead_columns == outputs.cols:
            fallback = "outputs counted alike: the output Hessian is zero, no gradient reached the layer"
    errors, energy = _errors_by_moments(values, turn, (recipe.format, codes, scales, divisor), rule, second_moment, outputs, precision or "float64", threads)
    report = LayerReport(
        method=method,
        format=recipe.format,
        rows=values.shape[0],
        cols=cols,
        scales=scales_name(recipe.format, search if usable else first, rule),
        weight_error=weight_error(recipe.format, values, turn, codes, scales, divisor, threads=threads),
        damped_errors=_damped_errors(losses, target, target_turn, factor, energy if target is values else None, precision, threads),
        scale_offsets=scale_offsets(recipe.format, values, turn, scales, divisor, rule, threads=threads),
        damping=factor.damping if factor else None,
        damping_asked=recipe.damping if factor else None,
        dead_columns=None if second_moment is None else int((second_moment.diagonal() == 0).sum()),
        fallback=fallback,
        precision=precision,
        output_damping=outputs.damping if outputs is not None else None,
        cross=recipe.cross if cross is not None and usable else 0.0,
        tokens=tokens,
        rotation=rotation.block_size,
        padding=padding,
        seconds=time.perf_counter() - start,
        **errors,
    )
    activations = activations_of(recipe)
    mask = clip_mask(recipe.format, rotation.apply(values, threads=threads), scales, divisor) if (search if usable else first) == "quest" else None
    return QuantizedMatrix(recipe.format, codes, scales, divisor, rotation, activations, recipe, report, clip_mask=mask, padding=padding)


def activations_of(recipe: Recipe, tensor_scale: float | None = None) -> Activations | None:
    """How a layer made by the recipe rounds its inputs; None for W4A16."""
    if recipe.activations is None:
        return None
    search, mx_rule = recipe.activation_scales
    return Activations(recipe.activations, mx_rule, tensor_scale, search)


def _shifted(
    weight: NDArray[np.float32], turn: Turn, cross: ArrayLike, stream: ArrayLike | None, padding: int, recipe: Recipe, factor: Factor | None, threads: int | None
) -> tuple[NDArray[np.float32], Turn]:
    """The weight moved to where it answers the inputs it will see as the original answered its own, and what turns it into the rotated basis; see ``cross`` and ``stream`` of quantize_layer."""
    if factor is None:
        raise ValueError('cross is given, but the recipe\'s solver is "rtn"; it needs "gptq"')
    if recipe.cross == 0:
        raise ValueError("cross is given, but the recipe's cross, how far the target moves, is 0; replace(recipe, cross=0.5) moves it half the way")
    rows, cols = weight.shape[0], weight.shape[1] - padding
    try:
        given = np.asarray(cross)
    except (ValueError, TypeError, RuntimeError) as error:  # ragged lists; tensors that NumPy cannot take
        raise TypeError(f"cross is not a matrix of numbers that NumPy reads: {error}") from None
    if given.dtype.kind not in "fiu":
        raise TypeError(f"cross is {given.dtype}; it must be a matrix of real numbers")
    if given.shape != (cols, cols):
        raise ValueError(f"cross has shape {given.shape}; a weight of {cols} columns needs ({cols}, {cols})")
    if not np.isfinite(given).all():
        raise ValueError(f"cross[{', '.join(map(str, np.argwhere(~np.isfinite(given))[0]))}] is not finite")
    missing = None if stream is None else as_float32(stream, "stream", rank=2, threads=threads)
    if missing is not None and missing.shape != (rows, cols):
        raise ValueError(f"stream has shape {missing.shape}; the weight's is {(rows, cols)}")
    if not factor.usable or factor.tokens == 0:
        return weight, turn
    target = _core.shift_to_inputs(weight, turn, factor.rotation.apply_both(_padded_moment(given, padding), threads=threads), None if missing is None else pad_columns(missing, padding), factor.core, recipe.cross, as_threads(threads))
    if _core.first_nonfinite(target, as_threads(threads)) >= 0:
        raise ValueError("cross moves the target beyond float32; it and stream must be of the size of the hessian")
    return target, 0


def _fits_float32(amax: float, factor: Factor) -> bool:
    """Whether losses of a weight with that amax can be compared in float32: the largest must stay clear of overflow, and of what vanishes, with room for smaller groups and for sums."""
    diagonal = float(factor.core.second_moment().diagonal().max())
    return not amax or not diagonal or 1e-20 < amax**2 * diagonal < 1e30


def _output_factor(output_hessian: ArrayLike, rows: int, recipe: Recipe, threads: int | None) -> Factor:
    """The factor of the outputs' second moment, which no rotation of the inputs touches."""
    if recipe.solver != "gptq":
        raise ValueError(f'output_hessian is given, but the recipe\'s solver is "{recipe.solver}"; it needs "gptq"')
    # A running sum is symmetric and goes to the factor as it is, without a matrix of its own.
    matrix = as_square(output_hessian, None, "output_hessian") if isinstance(output_hessian, Hessian) else as_symmetric(output_hessian, None, "output_hessian", copy=False, threads=threads)
    size = matrix.cols if isinstance(matrix, Hessian) else len(matrix)
    if size != rows:
        raise ValueError(f"output_hessian has shape ({size}, {size}); a weight of {rows} rows needs ({rows}, {rows})")
    return Factor(matrix, order="activation", damping=OUTPUT_DAMPING, precision=recipe.precision, threads=threads)


def _group_moments(second_moment: _core.SecondMoment, recipe: Recipe) -> NDArray[np.float64]:
    """The weights of errors in the Hessian's scale rules, (cols, group_size): a column that no input reached counts as the solver counts it, or its group's scale would follow nothing."""
    size = block_format(recipe.format).group_size
    groups, diagonal = second_moment.groups(size), second_moment.diagonal()
    dead = np.flatnonzero(diagonal == 0)
    if len(dead):
        groups[dead, dead % size] = 1.0 if len(dead) == len(diagonal) else max(recipe.damping, 0.01) * diagonal[diagonal != 0].mean()
    return groups


def _errors_by_moments(
    weight: NDArray[np.float32], turn: Turn, answer: PackedMatrix, mx_rule: str, second_moment: _core.SecondMoment | None, outputs: Factor | None, precision: str, threads: int | None
) -> tuple[dict[str, Any], float | None]:
    """The report's errors under the second moments at hand, each beside what plain rounding by absmax scales would have had; and tr(W H W^T)."""
    if second_moment is None:
        return {}, None
    format, _, _, divisor = answer
    codes, scales, _ = _core.quantize(format, "absmax", mx_rule, False, weight, turn, divisor, as_threads(threads))
    answers = [answer, (format, codes, scales, divisor)]
    energy, *losses = _core.quadratic_forms(weight, turn, answers, second_moment, precision, as_threads(threads))
    values: dict[str, Any] = dict(zip(("relative_error", "rounded_error"), (loss / energy if energy else None for loss in losses), strict=True))
    if outputs is not None:
        values |= zip(("output_error", "rounded_output_error"), output_errors(weight, turn, answers, outputs.core.second_moment(), second_moment, precision=precision, threads=threads), strict=True)
    return values, energy


def _damped_errors(
    losses: list[float], target: NDArray[np.float32], turn: Turn, factor: Factor | None, undamped: float | None, precision: str | None, threads: int | None
) -> tuple[float, ...]:
    """The solver's losses over tr(W R W^T), R = H + λI with dead columns weighed as the solver does; ``undamped``: tr(W H W^T) where it is known."""
    if not losses or factor is None or precision is None:
        return ()
    if undamped is None:
        (undamped,) = _core.quadratic_forms(target, turn, [], factor.core.second_moment(), precision, as_threads(threads))
    damping = np.where(factor.core.second_moment().diagonal() == 0, factor.core.dead_weight, factor.core.lambda_)
    energy = undamped + _core.diagonal_form(target, turn, damping[np.newaxis], as_threads(threads))
    return tuple(loss / energy for loss in losses) if energy > 0 else ()
