"""One layer: composes rotation, scales, solver and report."""

import time

from numpy.typing import ArrayLike

from . import _core
from .arrays import as_float32, as_symmetric, as_threads
from .codecs import check_groups, resolve_scales, scales_name, tensor_scale_for, weight_error
from .gptq import Factor, Hessian, relative_error
from .recipe import Recipe, as_recipe
from .result import Activations, LayerReport, QuantizedMatrix
from .rotations import rotation_of


def make_factor(hessian: ArrayLike, recipe: Recipe | str, *, format: str | None = None, threads: int | None = None) -> Factor:
    """The :class:`Factor` that layers with one input share under a recipe: pass it to ``quantize_layer(..., factor=)``."""
    recipe = as_recipe(recipe, format)
    return Factor(hessian, rotation=rotation_of(recipe.rotation), order=recipe.order, damping=recipe.damping, threads=threads)


def _check_factor(factor: Factor, recipe: Recipe, cols: int) -> None:
    if not isinstance(factor, Factor):
        raise TypeError(f"factor is {type(factor).__name__}; it must be what make_factor returned")
    asked = (cols, rotation_of(recipe.rotation), recipe.order, recipe.damping)
    made = (factor.cols, factor.rotation, factor.order_name, factor.damping_asked)
    for what, want, got in zip(("columns", "rotation", "order", "damping"), asked, made, strict=True):
        if want != got:
            raise ValueError(f"factor was made with {what} {got}; the layer and its recipe need {want}")


def quantize_layer(
    weight: ArrayLike,
    hessian: ArrayLike | None,
    recipe: Recipe | str = "mr-gptq",
    *,
    format: str | None = None,
    tensor_scale: float | None = None,
    factor: Factor | None = None,
    dtype: str | None = None,
    threads: int | None = None,
) -> QuantizedMatrix:
    """Quantise one linear layer's weight under its inputs' second moment.

    Parameters
    ----------
    weight : (rows, cols) array, rows = out_features, cols = in_features; float32 / float16 / bfloat16 / float64, finite, any strides.
    hessian : Hessian or (cols, cols) array, symmetric, in the original (not rotated) basis; any positive multiple of it gives the same codes.
        None is allowed for the solver "rtn", whose report then has no relative error, and where ``factor`` is given.
    recipe : Recipe, or a name ("rtn", "gptq", "mr-gptq") with ``format`` ("nvfp4" by default).
    tensor_scale : the NVFP4 divisor, where several layers share one; None takes 2688 / amax of the rotated weight.
    factor : what :func:`make_factor` made of the same Hessian and recipe, shared by layers with one input.
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
    Egiazarian et al. 2025 (arXiv 2509.23202), section 4; Frantar et al. 2022 (arXiv 2210.17323); the one-factor form after Chen et al. 2025 (arXiv 2507.18553).

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
    check_groups(cols, recipe.format)
    rotation = rotation_of(recipe.rotation)
    rotation.check_columns(cols, "weight")

    second_moment, tokens = None, None
    if recipe.solver == "gptq":
        if factor is None:
            if hessian is None:
                raise ValueError('hessian is None; only a recipe with the solver "rtn" does without')
            factor = make_factor(_checked_size(hessian, cols), recipe, threads=threads)
        _check_factor(factor, recipe, cols)
        second_moment, tokens = factor.hessian, factor.tokens
    elif factor is not None:
        raise ValueError(f'factor is given, but the solver "{recipe.solver}" uses none; pass the hessian alone')
    elif hessian is not None:
        second_moment, tokens = rotation.apply_hessian(_checked_size(hessian, cols), threads=threads), getattr(hessian, "tokens", None)

    rotated = values if recipe.rotation is None else rotation.apply(values, threads=threads)
    search, rule = resolve_scales(recipe.format, recipe.scales, recipe.mx_rule)
    divisor = tensor_scale_for(recipe.format, rotated, rule, tensor_scale, threads=threads)
    scales = _core.find_scales(recipe.format, search, rule, rotated, divisor, as_threads(threads))
    method, fallback = "rounding", None
    if factor is not None and factor.usable:
        method = "gptq"
        codes, _ = _core.solve(recipe.format, rotated, scales, divisor, factor.core, recipe.precision, as_threads(threads))
    else:
        if factor is not None:
            fallback = f"rounded plainly: the Hessian could not be factorised, not even with damping {factor.damping:g}"
        codes = _core.encode(recipe.format, rotated, scales, divisor, as_threads(threads))

    rounded = _core.dequantize(recipe.format, codes, scales, divisor, as_threads(threads))
    report = LayerReport(
        method=method,
        format=recipe.format,
        rows=values.shape[0],
        cols=cols,
        scales=scales_name(recipe.format, search, rule),
        weight_error=weight_error(rotated, rounded),
        relative_error=None if second_moment is None else relative_error(rotated - rounded, rotated, second_moment, threads=threads),
        damping=factor.damping if factor else None,
        damping_asked=recipe.damping if factor else None,
        dead_columns=None if second_moment is None else int((second_moment.diagonal() == 0).sum()),
        fallback=fallback,
        tokens=tokens,
        seconds=time.perf_counter() - start,
    )
    activations = Activations(recipe.activations, recipe.mx_rule) if recipe.activations else None
    return QuantizedMatrix(recipe.format, codes, scales, divisor, rotation, activations, recipe, report)


def _checked_size(hessian: ArrayLike, cols: int) -> ArrayLike:
    """Refuse a Hessian of another size before it is copied; what else may be wrong with it is found where it is."""
    shape = (hessian.cols, hessian.cols) if isinstance(hessian, Hessian) else getattr(hessian, "shape", None)
    if shape is None:
        hessian = as_symmetric(hessian, None)  # nested lists
        shape = hessian.shape
    if len(shape) == 2 and shape[0] == shape[1] and shape[0] != cols:
        raise ValueError(f"hessian has shape {tuple(shape)}; a weight of {cols} columns needs ({cols}, {cols})")
    return hessian
