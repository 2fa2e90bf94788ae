"""The model configurations that benches compare, in transformers' terms. Keep equal to the presets of `pnpm bench train`."""

CONFIGS = {
    # 12.5M parameters: 6 layers, the first dense; 16 experts, 4 chosen, from 2 of 4 groups
    "12m": dict(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, moe_intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8, n_shared_experts=1, n_routed_experts=16, routed_scaling_factor=2.5,
        kv_lora_rank=64, q_lora_rank=128, qk_rope_head_dim=16, v_head_dim=32, qk_nope_head_dim=32, n_group=4,
        topk_group=2, num_experts_per_tok=4, first_k_dense_replace=1,
    ),
    # 197M parameters: 8 layers, the first dense; 64 experts, 6 chosen, from 4 of 8 groups
    "200m": dict(
        vocab_size=8192, hidden_size=512, intermediate_size=2048, moe_intermediate_size=256, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, n_shared_experts=1, n_routed_experts=64, routed_scaling_factor=2.5,
        kv_lora_rank=128, q_lora_rank=256, qk_rope_head_dim=32, v_head_dim=64, qk_nope_head_dim=64, n_group=8,
        topk_group=4, num_experts_per_tok=6, first_k_dense_replace=1,
    ),
    # 1.08B parameters, heads of DeepSeek-V3's sizes: 10 layers, the first dense; 64 experts, 6 chosen, from 4 of 8 groups
    "1b": dict(
        vocab_size=32768, hidden_size=1024, intermediate_size=4096, moe_intermediate_size=512, num_hidden_layers=10,
        num_attention_heads=16, num_key_value_heads=16, n_shared_experts=1, n_routed_experts=64, routed_scaling_factor=2.5,
        kv_lora_rank=512, q_lora_rank=768, qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, n_group=8,
        topk_group=4, num_experts_per_tok=6, first_k_dense_replace=1,
    ),
}
TOKENS_PER_STEP = 2048
