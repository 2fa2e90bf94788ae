"""Fixtures of whole dense models as DeepSeek LLM 7B and 67B, from transformers' LlamaForCausalLM in f32 on random weights.

    .venv-reference/bin/python tools/reference/deepseek_llm.py [CASE ...]

writes packages/deepseek/fixtures/llama-<case>/, files and tensors as in deepseek_v3.py, and packages/deepseek/fixtures/llama-sizes.json: parameters of
the released models, counted on transformers' own modules without memory for them.
"""

import sys

import torch
from fixture_file import provenance, save_record
from whole_model import FAMILIES, OUT, make_config, write_case

BASE = dict(
    vocab_size=48, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
    max_position_embeddings=64, rms_norm_eps=1e-6, bos_token_id=0, eos_token_id=1,
)

CASES = {
    "mha": dict(config={}, note="the shape of DeepSeek LLM 7B: as many heads of keys and values as of queries"),
    "gqa": dict(
        config=dict(num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-3),
        note="the shape of DeepSeek LLM 67B: heads of keys and values are shared; another rms_norm_eps"),
    "tied-head-dim": dict(
        config=dict(num_attention_heads=4, num_key_value_heads=1, head_dim=10, tie_word_embeddings=True,
                    rope_parameters=dict(rope_type="default", rope_theta=500.0)),
        note="one head of keys and values, heads wider than hidden_size / heads, lm_head tied to the embedding, another rope_theta"),
    "yarn": dict(
        config=dict(rope_parameters=dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)),
        note="YaRN on all features of a head"),
    "padding": dict(config={}, pad=5, note="right padding: the last 5 tokens of row 1 are masked in attention and carry no loss"),
}

RELEASED = {
    "deepseek-llm-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=30, num_attention_heads=32,
                            num_key_value_heads=32),
    "deepseek-llm-67b": dict(hidden_size=8192, intermediate_size=22016, num_hidden_layers=95, num_attention_heads=64,
                             num_key_value_heads=8),
}


def sizes():
    counts = {}
    for name, fields in RELEASED.items():
        with torch.device("meta"):
            model = FAMILIES["llama"][1](make_config("llama", dict(vocab_size=102400, **fields)))
        counts[name] = sum(p.numel() for p in model.parameters())
    save_record(OUT / "llama-sizes.json", {**provenance(0), "parameters": counts})
    print(counts)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or CASES:
        write_case("llama", wanted, BASE, CASES[wanted])
    if not sys.argv[1:]:
        sizes()
