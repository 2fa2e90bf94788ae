"""Fixtures of whole DeepSeek-V3 models, from transformers' DeepseekV3ForCausalLM in f32 on random weights.

    .venv-reference/bin/python tools/reference/deepseek_v3.py [CASE ...]

writes packages/deepseek/fixtures/v3-<case>/:
    config.json           as save_pretrained writes it
    model.safetensors     weights under the on-disk names that save_pretrained writes (one tensor per expert)
    expected.safetensors  input_ids [2, 12] i32, labels i32 (-100 = no loss), logits [2, 12, vocab], grad.<weight name>
                          for every parameter, and per MoE layer i: router.<i>.logits [24, E], router.<i>.ids [24, K] i32
                          (ascending), router.<i>.weights [24, K] (in the order of ids)
    fixture.json          seed, versions, command, loss, gradient norm, ten AdamW losses, routing margin, notes

Loss is the mean cross-entropy of the next token. The seed of a case is the first one for which no routing decision, in the
first pass and in all ten steps, is nearer than MIN_MARGIN to a tie: so an implementation that rounds differently
still chooses the same experts.
"""

import sys

from whole_model import YARN, write_case

BASE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=40, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, routed_scaling_factor=2.5,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8, n_group=4, topk_group=2,
    num_experts_per_tok=3, first_k_dense_replace=1, max_position_embeddings=64, num_nextn_predict_layers=0,
    rope_theta=10000.0, bos_token_id=0, eos_token_id=1,
)

CASES = {
    "base": dict(config={}, bias="mixed", note="q_lora, 4 groups of which 2, one shared expert, first layer dense"),
    "no-q-lora": dict(
        config=dict(q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=2, num_experts_per_tok=3,
                    routed_scaling_factor=2.446, rms_norm_eps=1e-5, rope_theta=50000.0),
        bias="mixed", note="the shape of Moonlight: no q_lora, one group, two shared experts, rms_norm_eps 1e-5 "
                           "(the two inner norms of attention keep 1e-6)"),
    "yarn": dict(
        config=dict(rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0), max_position_embeddings=163840,
                    n_group=2, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=0, hidden_size=24,
                    vocab_size=48),
        bias="mixed", note="YaRN with equal mscale, no dense layer"),
    "yarn-mscale": dict(
        config=dict(rope_scaling=dict(YARN, mscale=0.5, mscale_all_dim=0.8), max_position_embeddings=163840,
                    q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=0, first_k_dense_replace=0,
                    hidden_size=24, vocab_size=48, norm_topk_prob=False, routed_scaling_factor=1.0),
        bias="zero", note="YaRN with unequal mscale (cos and sin are scaled too), no shared expert, weights not normalized"),
    "negative-bias": dict(
        config={}, bias="negative",
        note="all selection biases negative: a gate that masks dropped groups with 0 instead of -inf fails here"),
    "dense-tied": dict(
        config=dict(first_k_dense_replace=2, tie_word_embeddings=True), bias="zero",
        note="no MoE layer, lm_head tied to the embedding (absent from model.safetensors)"),
    "padding": dict(
        config=dict(n_group=2, topk_group=1), bias="mixed", pad=5,
        note="right padding: the last 5 tokens of row 1 are masked in attention and carry no loss"),
    "mtp": dict(
        config=dict(num_nextn_predict_layers=1, hidden_size=24, vocab_size=48, num_hidden_layers=2,
                    moe_intermediate_size=4, intermediate_size=32, q_lora_rank=12, kv_lora_rank=12),
        bias="mixed",
        note="one MTP layer at index num_hidden_layers, fed [enorm(embedding of the next token); hnorm(main hidden "
             "state after model.norm)]; loss = main + 0.3 * mtp; position i of mtp_logits predicts token i + 2"),
    "mtp-2": dict(
        config=dict(num_nextn_predict_layers=2, hidden_size=16, vocab_size=40, num_hidden_layers=1, first_k_dense_replace=0,
                    moe_intermediate_size=4, q_lora_rank=None, kv_lora_rank=8, n_group=1, topk_group=1),
        bias="mixed",
        note="two MTP layers: the second continues from the first one's state after shared_head.norm; loss = main + 0.3 * "
             "mean of both; position i of mtp_logits_2 predicts token i + 3"),
}

if __name__ == "__main__":
    for wanted in sys.argv[1:] or CASES:
        write_case("v3", wanted, BASE, CASES[wanted])
