"""Text from a model, token by token."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer


@dataclass(frozen=True)
class Generated:
    """What a model wrote, and how long it took.

    Attributes
    ----------
    text : the new text. prompt_tokens, new_tokens : int.
    prompt_seconds : until the first new token was there. seconds : wall time of all.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of the new tokens after the first; 0 where there is none."""
        rest = self.seconds - self.prompt_seconds
        return (self.new_tokens - 1) / rest if self.new_tokens > 1 and rest > 0 else 0.0


class _Stream(TextStreamer):
    """Hands text over as soon as its words are whole, and notes when the first new token came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write, self.first, self._calls = write, 0.0, 0

    def put(self, value: torch.Tensor) -> None:
        self._calls += 1
        if self._calls == 2:  # the first call brings the prompt
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, *, tokens: int = 128, temperature: float = 0.0, seed: int = 0, write: Callable[[str], None] | None = None) -> Generated:
    """Continue a text.

    Parameters
    ----------
    model, tokenizer : of :func:`load_quantized` or :func:`load_model`, and :func:`load_tokenizer`.
    prompt : str, not empty; it is tokenised as the tokenizer does by default.
    tokens : at most so many new ones; fewer where the model ends its text.
    temperature : 0 takes the likeliest token each time; above 0 tokens are drawn from the predictions divided by it, whatever the model's generation_config.json says of drawing and of beams; what else it says,
        such as which tokens end a text, holds. seed : of the drawing; torch's own generator is left where it was.
    write : called with each piece of new text as soon as it is there.

    Raises
    ------
    TypeError : ``tokens`` or ``seed`` that are no whole numbers. ValueError : an empty prompt, a temperature between 0 and 1e-6 or below 0, a seed that is negative or beyond 63 bits, ``tokens`` below 1, or more tokens than the model has positions.
    """
    for name, value in (("tokens", tokens), ("seed", seed)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it must be a whole number")
    if not prompt:
        raise ValueError("the prompt is empty; a model needs a text to go on from")
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; it must be 1 or more")
    if temperature != 0 and not 1e-6 <= temperature < float("inf"):  # logits divided by less might overflow
        raise ValueError(f"temperature is {temperature}; it must be 0 or a finite number from 1e-6 on")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be from 0 to 2^63 - 1")
    inputs = tokenizer(prompt, return_tensors="pt")
    count = inputs["input_ids"].shape[1]
    if count == 0:
        raise ValueError("the prompt is empty; a model needs a token to begin with")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and count + tokens > positions:
        raise ValueError(f"the prompt has {count} tokens; with {tokens} new ones it is longer than the model's {positions} positions")
    pieces: list[str] = []

    def hand_over(text: str) -> None:
        pieces.append(text)
        if write:
            write(text)

    stream = _Stream(tokenizer, hand_over)
    # Whatever else would bend the predictions, by names of which not every transformers has all.
    off = {"top_k": 0, "top_p": 1.0, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "top_h": None}
    drawing: dict[str, Any] = {name: value if temperature else None for name, value in off.items() if hasattr(model.generation_config, name)}
    drawing |= {"do_sample": temperature > 0, "temperature": temperature or None}
    device, prompted = next(model.parameters()).device, inputs["input_ids"]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        begin = time.perf_counter()
        ids = model.generate(
            prompted.to(device), attention_mask=torch.ones_like(prompted, device=device), max_new_tokens=tokens, streamer=stream, use_cache=True, num_beams=1, num_return_sequences=1,
            return_dict_in_generate=False, tokenizer=tokenizer,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0, **drawing,
        )  # fmt: skip
        end = time.perf_counter()
    return Generated("".join(pieces), count, ids.shape[1] - count, (stream.first or end) - begin, end - begin)
