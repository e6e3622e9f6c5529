"""Tiny random models with experts, as transformers makes and writes them."""

import shutil

_COMMON = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, head_dim=16)
_DEEPSEEK = dict(n_routed_experts=6, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)
KINDS = {
    "mixtral": dict(num_local_experts=6),
    "qwen3_moe": dict(num_experts=6, moe_intermediate_size=32, decoder_sparse_step=1, mlp_only_layers=[0]),
    "qwen2_moe": dict(num_experts=6, moe_intermediate_size=32, shared_expert_intermediate_size=64, decoder_sparse_step=1, mlp_only_layers=[]),
    "olmoe": dict(num_experts=6, intermediate_size=32, pad_token_id=0, eos_token_id=0),
    "deepseek_v3": dict(q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, **_DEEPSEEK),
    "glm4_moe": _DEEPSEEK,
}
"""By model_type: what its configuration has more."""


def make_moe(kind, folder, tokenizer_folder, seed=0, **more):
    """A folder with a random model of that kind and a tokenizer; the model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=1024, num_experts_per_tok=2, **{**_COMMON, **KINDS[kind], **more})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:  # as large as trained ones, so that the router has its preferences
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.normal_(std=0.1)
    model.save_pretrained(folder)
    for path in tokenizer_folder.glob("tokenizer*"):
        shutil.copy(path, folder)
    return model
