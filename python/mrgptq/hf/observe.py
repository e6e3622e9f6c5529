"""What a model's linear layers see and hold: second moments of their inputs, weights."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..arrays import located
from ..gptq import Hessian
from ..modules import fused_groups
from .activations import to_numpy


@torch.no_grad()
def collect_hessians(model: Any, inputs: torch.Tensor, modules: Sequence[str], *, batch_windows: int = 8, threads: int | None = None, progress: Callable[[int, int], None] | None = None) -> dict[str, Hessian]:
    """{module: Hessian of its inputs} over a text, the model as it is; ``mrgptq.save_hessians`` stores them. ``inputs``: (windows, sequence) int64; modules that share an input share the Hessian. ``progress``: called as progress(windows done, windows)."""
    groups = fused_groups(modules)
    hessians = {group: Hessian(model.get_submodule(group[0]).in_features) for group in groups}

    def watch(name: str, hessian: Hessian) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            values, dtype = to_numpy(args[0])
            with located(f"the input of {name}"):
                hessian.update(values, dtype=dtype, threads=threads)

        return hook

    handles = [model.get_submodule(group[0]).register_forward_pre_hook(watch(group[0], hessian)) for group, hessian in hessians.items()]
    try:
        device = next(model.parameters()).device
        done = 0
        for batch in inputs.split(batch_windows):
            model.base_model(input_ids=batch.to(device), use_cache=False)
            done += len(batch)
            if progress:
                progress(done, len(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return {name: hessian for group, hessian in hessians.items() for name in group}


def layer_weights(model: Any, modules: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """{module: (rows, cols) float32 weight} of linear modules."""
    return {name: to_numpy(model.get_submodule(name).weight.float())[0] for name in modules}
