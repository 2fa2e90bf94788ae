"""Fixtures of whole DeepSeek-V2 models, from transformers' DeepseekV2ForCausalLM in f32 on random weights.

    .venv-reference/bin/python tools/reference/deepseek_v2.py [CASE ...]

writes packages/deepseek/fixtures/v2-<case>/, files and tensors as in deepseek_v3.py. V2 has softmax affinities, no selection
bias, groups judged by their best expert, gates that are not normalized, and no MTP layer.
"""

import sys

from whole_model import YARN, write_case

BASE = dict(
    vocab_size=48, hidden_size=24, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, routed_scaling_factor=4.0,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8, n_group=4, topk_group=2,
    num_experts_per_tok=3, topk_method="group_limited_greedy", first_k_dense_replace=1, max_position_embeddings=64,
    rope_theta=10000.0, bos_token_id=0, eos_token_id=1,
)
LITE = dict(q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy", n_shared_experts=2, routed_scaling_factor=1.0)

CASES = {
    "group-limited": dict(config={}, note="the shape of V2: q_lora, 4 groups of which 2, first layer dense"),
    "lite": dict(config=LITE, note="the shape of V2-Lite: no q_lora, no groups, two shared experts"),
    "yarn": dict(
        config=dict(rope_scaling=dict(YARN, mscale=0.707, mscale_all_dim=0.707), max_position_embeddings=163840),
        note="YaRN as V2 and V2-Lite have it, mscale 0.707"),
    "yarn-mscale": dict(
        config=dict(LITE, rope_scaling=dict(YARN, mscale=0.5, mscale_all_dim=0.8), max_position_embeddings=163840),
        note="YaRN with unequal mscale: cos and sin are scaled too"),
    "no-shared": dict(
        config=dict(n_shared_experts=0, n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=0),
        note="no shared expert, no dense layer, two groups of which one"),
    "dense-tied": dict(
        config=dict(first_k_dense_replace=2, tie_word_embeddings=True),
        note="no MoE layer, lm_head tied to the embedding"),
    "padding": dict(
        config=LITE, pad=5, note="right padding: the last 5 tokens of row 1 are masked in attention and carry no loss"),
    "eps": dict(
        config=dict(rms_norm_eps=1e-3, rope_theta=500.0, num_attention_heads=3, v_head_dim=8),
        note="rms_norm_eps 1e-3 (the two inner norms of attention keep 1e-6), another rope_theta, three heads"),
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or CASES:
        write_case("v2", wanted, BASE, CASES[wanted])
