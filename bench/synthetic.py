"""A Llama of random weights, as large as asked, to measure memory on: a checkpoint in bfloat16, written tensor by tensor."""

import json
from pathlib import Path

import numpy as np

from mrgptq.checkpoint.stored_tensor import StoredTensor
from mrgptq.checkpoint.writer import CheckpointWriter

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KEY_HEADS = 2048, 5632, 32000, 32, 8


def shapes_of(blocks: int) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of so many blocks."""
    keys = HIDDEN // HEADS * KEY_HEADS
    block = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (keys, HIDDEN), "self_attn.v_proj": (keys, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    block |= {"mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
    outside = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return outside | {f"model.layers.{i}.{name}.weight": shape for i in range(blocks) for name, shape in block.items()}


def write_model(out: Path, gigabytes: float, tokenizer: Path) -> str:
    """Write the folder ``out``, of about so many gigabytes, with another model's tokenizer; says what it is."""
    size = {blocks: 2 * sum(int(np.prod(shape)) for shape in shapes_of(blocks).values()) for blocks in (1, 2)}
    blocks = max(1, round((1e9 * gigabytes - size[1]) / (size[2] - size[1])) + 1)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": blocks, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    config |= {"vocab_size": VOCABULARY, "dtype": "bfloat16", "tie_word_embeddings": False, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    rng = np.random.default_rng(0)
    with CheckpointWriter(out, 1_000_000_000) as writer:
        for name, shape in shapes_of(blocks).items():
            values = np.ones(shape, np.float32) if len(shape) == 1 else 0.02 * rng.standard_normal(shape, dtype=np.float32)
            writer.add(name, StoredTensor.from_bits("BF16", (values.view(np.uint32) >> 16).astype(np.uint16)))
        writer.write_text("config.json", json.dumps(config, indent=2) + "\n")
        for path in tokenizer.glob("tokenizer*"):
            writer.copy(path)
    return f"{blocks} blocks of a random Llama, {sum(path.stat().st_size for path in out.iterdir()) / 1e9:.2f} GB in bfloat16"
