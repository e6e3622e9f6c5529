"""Which tensors of a checkpoint are linear layers to quantise, and which of them a runtime fuses into one."""

import re
from collections.abc import Iterable, Mapping, Sequence

FUSED_SUFFIXES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))
"""Layers of one parent that read the same input and that vLLM and TensorRT-LLM load as one matrix with one NVFP4 tensor scale."""

DEFAULT_TARGETS = r"\.\d+\.(?!.*(router|gate$|norm|embed))"
"""Every linear layer inside a numbered block, but not the routers of experts, which are small and decide much."""

DEFAULT_IGNORE = "lm_head"


def as_pattern(pattern: str, name: str) -> re.Pattern[str]:
    """A compiled regular expression, or ValueError that says what is wrong with it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} is {pattern!r}, which is not a regular expression: {error}") from None


def select_modules(shapes: Mapping[str, Sequence[int]], targets: str = DEFAULT_TARGETS, ignore: str = DEFAULT_IGNORE) -> list[str]:
    """Names of the modules to quantise, in the checkpoint's order.

    Parameters
    ----------
    shapes : mapping of tensor names to shapes. Only matrices called ``<module>.weight`` count.
    targets, ignore : regular expressions, searched for in the module's name; ``ignore`` wins. An empty ``ignore`` ignores nothing.

    Raises
    ------
    ValueError : not a regular expression, or nothing is left to quantise.
    """
    wanted, unwanted = as_pattern(targets, "targets"), as_pattern(ignore, "ignore") if ignore else None
    matrices = [name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2]
    chosen = [name for name in matrices if wanted.search(name) and not (unwanted and unwanted.search(name))]
    if not chosen:
        raise ValueError(f"no module to quantise: of {len(matrices)} matrices none matches targets {targets!r} without matching ignore {ignore!r}")
    return chosen


def fused_groups(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The modules as tuples that share an input and a tensor scale, singletons included, in the order of their first member."""
    names = list(names)
    known = set(names)
    group_of: dict[str, tuple[str, ...]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        for suffixes in FUSED_SUFFIXES:
            if leaf in suffixes:
                group_of[name] = tuple(member for suffix in suffixes if (member := f"{parent}.{suffix}" if parent else suffix) in known)
        group_of.setdefault(name, (name,))
    return list(dict.fromkeys(group_of[name] for name in names))
