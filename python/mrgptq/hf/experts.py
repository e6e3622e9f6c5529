"""Experts that transformers holds as one tensor of rank 3, taken apart into linear layers under the names that their checkpoint has."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from transformers.integrations.moe import _default_apply_gate

_LEAVES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_PARENTS = {"mlp": ("mlp", "block_sparse_moe")}  # by what transformers calls a module: what checkpoints may
_FORM = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False}
"""Of the modules that the forward pass below stands in for, as transformers' decorator use_experts_implementation tells of a class; their gate is its default one, too."""


class Experts(torch.nn.Module):
    """One module an expert, with linear layers for gate, up and down; the tokens that are routed to it pass through it together.

    Parameters
    ----------
    fused : the module of transformers, whose numbers it shares. leaves : what gate, up and down are called.
    """

    def __init__(self, fused: Any, leaves: Sequence[str]) -> None:
        super().__init__()
        self._leaves, self.act_fn = leaves, fused.act_fn
        for index, (gate_up, down) in enumerate(zip(fused.gate_up_proj, fused.down_proj, strict=True)):
            expert = torch.nn.Module()
            for leaf, weight in zip(leaves, (*gate_up.chunk(2), down), strict=True):
                expert.add_module(leaf, _linear(weight))
            self.add_module(str(index), expert)
        self.count = len(fused.down_proj)

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """hidden (tokens, cols); chosen (tokens, k) experts of each token and their weights: (tokens, cols), the weighted sum of their answers."""
        out = torch.zeros_like(hidden)
        for index in range(self.count):
            tokens, place = torch.where(chosen == index)
            if len(tokens):
                gate, up, down = (self.get_submodule(f"{index}.{leaf}") for leaf in self._leaves)
                x = hidden[tokens]
                answer = down(self.act_fn(gate(x)) * up(x)) * weights[tokens, place, None]
                out.index_add_(0, tokens, answer.to(out.dtype))
        return out


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    return linear


def split_experts(model: Any, names: Collection[str]) -> None:
    """Put :class:`Experts` in the place of modules that fuse them, where a checkpoint of these tensor names has a matrix for each layer of each.

    A block's parent of them that the checkpoint calls otherwise is registered under that name, so that from here on the model's names are the checkpoint's. Experts of another form, or which the checkpoint
    holds fused, are left as they are.
    """
    held = set(_experts_of(names))
    for path, fused in [(path, module) for path, module in model.named_modules() if _is_fused(module)]:
        block, _, rest = path.rpartition(".experts")[0].rpartition(".")
        for parent in _PARENTS.get(rest, (rest,)):
            leaves = next((leaves for leaves in _LEAVES if (f"{block}.{parent}", leaves[0]) in held), None)
            if leaves is None:
                continue
            owner = model.get_submodule(block)
            moe = getattr(owner, rest)
            moe.experts = Experts(fused, leaves)
            if parent != rest:
                del owner._modules[rest]
                owner.add_module(parent, moe)
                owner.__dict__[rest] = moe  # where the block's own code finds it


def _experts_of(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """(parent, leaf) of the first expert of each parent among a checkpoint's tensors."""
    for name in names:
        parent, found, rest = name.partition(".experts.0.")
        if found:
            yield parent, rest.partition(".")[0]


def _is_fused(module: Any) -> bool:
    form = all(getattr(module, name, None) == value for name, value in _FORM.items())
    return form and module.gate_up_proj.ndim == 3 and type(module)._apply_gate is _default_apply_gate
