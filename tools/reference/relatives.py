"""Fixtures of whole models of DeepSeek-V3's architecture under other names, from transformers' own classes in f32 on random weights.

    .venv-reference/bin/python tools/reference/relatives.py [CASE ...]

writes packages/deepseek/fixtures/glm-<case>/ (Glm4MoeLiteForCausalLM), youtu-<case>/ (YoutuForCausalLM), v32-<case>/
(DeepseekV32ForCausalLM), dsa-<case>/ (GlmMoeDsaForCausalLM), mistral-<case>/ (Mistral4ForCausalLM) and kimi-k25/, files and tensors as in
deepseek_v3.py, and packages/deepseek/fixtures/relatives-sizes.json: parameters of the released models, counted on transformers' own modules without
memory for them.

kimi-k25 is v3-base as the text model of one that sees, under the keys of the released files. Kimi_K25ForConditionalGeneration opens it and has the logits
of v3-base for its text.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from fixture_file import deterministic, provenance, save_record, save_tensors
from safetensors.torch import load_file
from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration
from whole_model import FAMILIES, OUT, YARN, make_config, write_case

GLM = dict(
    vocab_size=48, hidden_size=24, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2, routed_scaling_factor=1.8, kv_lora_rank=12,
    q_lora_rank=12, qk_nope_head_dim=12, qk_rope_head_dim=4, v_head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=64,
    rope_theta=1000000.0, partial_rotary_factor=1.0, num_nextn_predict_layers=0, bos_token_id=None, eos_token_id=[1, 2, 3],
    topk_method="noaux_tc",
)
YOUTU = dict(
    vocab_size=48, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    kv_lora_rank=12, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=64,
    rope_theta=1600000.0, bos_token_id=0, eos_token_id=1,
)
V32 = dict(
    vocab_size=48, hidden_size=24, intermediate_size=32, moe_intermediate_size=4, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2, routed_scaling_factor=2.5, kv_lora_rank=12,
    q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_group=4, topk_group=2, first_k_dense_replace=1,
    max_position_embeddings=163840, rope_theta=10000.0, rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0), bos_token_id=0,
    eos_token_id=1, topk_method="noaux_tc", scoring_func="sigmoid", index_topk=4, index_n_heads=8, index_head_dim=6,
)
DSA = {**GLM, "moe_intermediate_size": 4, "first_k_dense_replace": 1, "index_topk": 3, "index_n_heads": 6, "index_head_dim": 8,
       "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1}
MISTRAL = dict(
    vocab_size=48, hidden_size=24, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=12, q_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    pad_token_id=None,  # with one, its row of the embedding gets no gradient
    rope_parameters=dict(
        rope_type="yarn", rope_theta=10000.0, factor=16.0, original_max_position_embeddings=3, beta_fast=32.0, beta_slow=1.0,
        mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.4),
)

CASES = {
    "v32-mtp": dict(
        config=dict(num_nextn_predict_layers=1), bias="mixed",
        note="DeepSeek-V3.2: attention to 4 of 12 keys, YaRN, an MTP layer with an indexer of its own"),
    "dsa-glm": dict(config={}, bias="mixed", note="the shape of GLM-5: attention to 3 of 12 keys, by indexers that rotate adjacent features"),
    "dsa-shared": dict(
        config=dict(num_hidden_layers=5, index_topk_freq=2, index_skip_topk_offset=2, hidden_size=16, n_routed_experts=4, moe_intermediate_size=4,
                    intermediate_size=16, vocab_size=40, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, v_head_dim=8),
        bias="mixed", note="the shape of GLM-5.2: two layers attend to the 3 of 12 keys that the indexer of the layer before them selects"),
    "mistral-base": dict(
        config=dict(first_k_dense_replace=1),
        note="the shape of Mistral Small 4 with one dense layer: queries scaled in four steps of 3 positions, softmax gate"),
    "mistral-padding": dict(
        config=dict(q_lora_rank=None, rope_interleave=False, norm_topk_prob=False, routed_scaling_factor=1.5, n_shared_experts=2,
                    moe_intermediate_size=6), pad=5,
        note="queries not compressed, halves turned, gates as they are; right padding: the last 5 tokens of row 1 carry no loss"),
    "glm-mtp": dict(
        config=dict(num_nextn_predict_layers=1, moe_intermediate_size=4, hidden_size=20), bias="mixed",
        note="the shape of GLM-4.7-Flash: values as wide as queries, one dense layer, one group, an MTP layer behind the last"),
    "glm-two-dense": dict(
        config=dict(mlp_layer_types=["dense", "dense", "sparse"], num_hidden_layers=3, hidden_size=16, n_group=2, topk_group=1,
                    n_shared_experts=2, norm_topk_prob=False),
        bias="mixed", note="two dense layers by mlp_layer_types; two groups of which one, gates as they are"),
    "youtu-tied": dict(config={}, note="the shape of Youtu-LLM-2B: latent attention in dense layers, lm_head tied to the embedding"),
    "youtu-padding": dict(
        config=dict(tie_word_embeddings=False, q_lora_rank=None, rope_interleave=False, rms_norm_eps=1e-5), pad=5,
        note="untied, queries not compressed, halves turned; right padding: the last 5 tokens of row 1 carry no loss"),
}

BASES = {"glm": GLM, "youtu": YOUTU, "v32": V32, "dsa": DSA, "mistral": MISTRAL}
RELEASED = {
    "glm-4.7-flash": ("glm", {}),
    "youtu-llm-2b": ("youtu", {}),
    "deepseek-v3.2": ("v32", {}),
    "mistral-small-4": ("mistral", {}),
}

VISION = dict(num_attention_heads=1, num_hidden_layers=1, hidden_size=8, intermediate_size=8, pos_emb_height=2, pos_emb_width=2, patch_size=2)


def kimi():
    source, folder = OUT / "v3-base", OUT / "kimi-k25"
    deterministic(1)
    text = json.loads((source / "config.json").read_text())
    config = Kimi_K25Config(text_config={**text, "model_type": "kimi_k2"}, vision_config=VISION, projection_hidden_size=8, tie_word_embeddings=False)
    weights = {f"language_model.{key}": t for key, t in load_file(source / "model.safetensors").items()}
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as made:
        Kimi_K25ForConditionalGeneration(config).save_pretrained(made)
        others = {key: t for key, t in load_file(Path(made) / "model.safetensors").items() if not key.startswith("language_model.")}
        config_json = json.loads((Path(made) / "config.json").read_text())
    size = save_tensors(folder / "model.safetensors", {**weights, **others})
    save_record(folder / "config.json", {**config_json, "text_config": {**text, "model_type": "kimi_k2"}})
    model, info = Kimi_K25ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info.values()), info
    expected = load_file(source / "expected.safetensors")
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"].long()).logits
    assert torch.allclose(logits, expected["logits"], rtol=1e-4, atol=1e-5), (logits - expected["logits"]).abs().max()
    shutil.copy(source / "expected.safetensors", folder)
    record = json.loads((source / "fixture.json").read_text())
    save_record(folder / "fixture.json", {**record, **provenance(1), "about": "v3-base as the text model of Kimi K2.5, among weights of one that sees"})
    print(f"{folder.name}: {size} bytes")


def sizes():
    counts = {}
    for name, (family, fields) in RELEASED.items():
        with torch.device("meta"):
            model = FAMILIES[family][1](make_config(family, fields))
        biases = [b for key, b in model.named_buffers() if key.endswith("e_score_correction_bias")]
        counts[name] = sum(t.numel() for t in [*model.parameters(), *biases])
    save_record(OUT / "relatives-sizes.json", {**provenance(0), "parameters": counts})
    print(counts)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or CASES:
        family, _, case = wanted.partition("-")
        write_case(family, case, BASES[family], CASES[wanted])
    if not sys.argv[1:]:
        kimi()
        sizes()
