"""Fixtures of Multi-head Latent Attention alone, from transformers' DeepseekV3Attention in f32 (eager, causal).

    .venv-reference/bin/python tools/reference/mla.py [CASE ...]

writes packages/attention-mla/fixtures/<case>.safetensors and <case>.json. Tensors (B batch, T time, D hidden, H heads):
    hidden_states [B, T, D], position_ids [B, T] i32, cos and sin [B, T, rope] (halves repeated, factor of YaRN included),
    inv_freq [rope / 2], weight.<name> (checkpoint names below self_attn), output [B, T, D],
    cache.c_kv [B, T, kv_lora] (after its norm) and cache.k_rope [B, T, rope] (after RoPE, adjacent pairs as in the
    released code), grad_output, grad.hidden_states, grad.weight.<name>.

scaled-queries is Mistral4Attention. The sparse cases are DeepseekV32Attention and GlmMoeDsaAttention, whose indexer gets no gradient. Their seed is the first one for
which no selection is nearer than MIN_MARGIN to a tie; topk [B, T, K] i32 are the selected positions, ascending, -1 where a query
sees fewer keys.
"""

import copy
import sys

import torch
from fixture_file import ROOT, deterministic, provenance, save_record, save_tensors
from selection import SelectionCheck
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek_v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm_moe_dsa
from transformers.models.mistral4 import modeling_mistral4 as mistral4

OUT = ROOT / "packages/attention-mla/fixtures"
BASE = dict(
    hidden_size=36, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=20, kv_lora_rank=16, qk_nope_head_dim=12,
    qk_rope_head_dim=8, v_head_dim=10, max_position_embeddings=64, rope_theta=10000.0, rms_norm_eps=1e-5,
)
YARN = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, original_max_position_embeddings=4096)
SPARSE = dict(index_topk=4, index_n_heads=6, index_head_dim=12)
MIN_MARGIN = 1e-3
CASES = {
    "q-lora": dict(seed=11, config={}, starts=[0, 0], note="with q_lora, plain RoPE"),
    "no-q-lora": dict(seed=12, config=dict(q_lora_rank=None, rope_theta=50000.0), starts=[0, 3],
                      note="without q_lora; row 1 starts at position 3"),
    "yarn": dict(seed=13, config=dict(rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0),
                                      max_position_embeddings=163840), starts=[0, 5000],
                 note="YaRN of DeepSeek-V3; row 1 starts at position 5000"),
    "yarn-mscale": dict(seed=14, config=dict(rope_scaling=dict(YARN, mscale=0.5, mscale_all_dim=0.8), q_lora_rank=None,
                                             max_position_embeddings=163840), starts=[7, 0],
                        note="YaRN with unequal mscale: cos and sin carry their ratio, the softmax scale mscale_all_dim"),
    "scaled-queries": dict(
        seed=17, classes=(mistral4, "Mistral4"), starts=[0, 30],
        config=dict(rope_scaling=dict(YARN, original_max_position_embeddings=4, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3)),
        note="queries scaled by their positions, as in Mistral Small 4: one step per 4 positions; row 1 starts at position 30"),
    "sparse": dict(seed=15, config=SPARSE, starts=[0, 3], classes=(deepseek_v32, "DeepseekV32"),
                   note="sparse attention of DeepSeek-V3.2 to 4 of 10 keys"),
    "sparse-interleaved": dict(
        seed=16, config=dict(SPARSE, index_topk=3, indexer_rope_interleave=True), starts=[0, 0], classes=(glm_moe_dsa, "GlmMoeDsa"),
        note="sparse attention of GLM-5, whose indexer rotates adjacent features"),
}



def write_case(case):
    spec = CASES[case]
    for seed in range(spec["seed"], 1000, 100):
        if write_with_seed(case, spec, seed):
            return
    raise SystemExit(f"{case}: no seed keeps the selection {MIN_MARGIN} away from a tie")


def classes(spec):
    """The configuration, the attention and the rotary embedding of a case."""
    if "classes" not in spec:
        return DeepseekV3Config, DeepseekV3Attention, DeepseekV3RotaryEmbedding
    module, prefix = spec["classes"]
    return tuple(getattr(module, prefix + name) for name in ("Config", "Attention", "RotaryEmbedding"))


def rope_parameters(fields, make_config):
    """The fields of a configuration; Mistral4Config has defaults for RoPE that only rope_parameters replaces."""
    if "Mistral4" not in make_config.__name__:
        return fields
    scaling, theta = fields.pop("rope_scaling"), fields.pop("rope_theta")
    return {**fields, "rope_parameters": {**scaling, "rope_theta": theta}}


def write_with_seed(case, spec, seed):
    deterministic(seed)
    g = torch.Generator().manual_seed(seed)
    make_config, make_attention, make_rotary = classes(spec)
    config = make_config(**rope_parameters({**BASE, **copy.deepcopy(spec["config"])}, make_config))
    config._attn_implementation = "eager"
    attention = make_attention(config, layer_idx=0).eval()
    rotary = make_rotary(config)
    check = SelectionCheck()
    check.watch(attention)
    with torch.no_grad():
        for name, p in attention.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(1 + 0.2 * noise if "norm" in name else 1.5 * noise / p.shape[-1] ** 0.5)
    batch, time = 2, 10
    hidden = torch.randn(batch, time, config.hidden_size, generator=g).requires_grad_()
    positions = torch.tensor(spec["starts"])[:, None] + torch.arange(time)[None]
    cos, sin = rotary(hidden, positions)
    causal = torch.full((time, time), float("-inf")).triu(1)[None, None]
    at = {"position_ids": positions} if "Mistral4" in type(attention).__name__ else {}
    output = attention(hidden, (cos, sin), causal, **at)[0]
    if check.margin < MIN_MARGIN:
        return False
    grad_output = torch.randn(output.shape, generator=g)
    output.backward(grad_output)

    with torch.no_grad():
        c_kv, k_rope = attention.kv_a_proj_with_mqa(hidden).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        c_kv = attention.kv_a_layernorm(c_kv)
        # The released code turns adjacent elements as complex numbers; transformers stores the same values in halves.
        pairs = torch.view_as_complex(k_rope.unflatten(-1, (-1, 2)).contiguous())
        half = config.qk_rope_head_dim // 2
        turned = torch.view_as_real(pairs * torch.complex(cos[..., :half], sin[..., :half])).flatten(-2)
    tensors = {
        "hidden_states": hidden, "position_ids": positions.int(), "cos": cos, "sin": sin, "inv_freq": rotary.inv_freq,
        "output": output, "cache.c_kv": c_kv, "cache.k_rope": turned, "grad_output": grad_output,
        "grad.hidden_states": hidden.grad,
    }
    tensors |= {f"weight.{k}": v for k, v in attention.named_parameters()}
    tensors |= {f"grad.weight.{k}": v.grad for k, v in attention.named_parameters() if v.grad is not None}
    tensors |= {"topk": chosen for chosen in check.seen.values()}
    size = save_tensors(OUT / f"{case}.safetensors", tensors)
    keys = ["rope_theta", "rope_scaling", *[k for k in BASE if k != "rope_theta"], *SPARSE, "indexer_rope_interleave"]
    given = {**BASE, **spec["config"]}
    save_record(OUT / f"{case}.json", {
        "about": spec["note"], **provenance(seed), "config": {k: given[k] for k in keys if k in given},
        "softmaxScale": attention.scaling, "ropeScale": rotary.attention_scaling,
        "innerNormEps": attention.kv_a_layernorm.variance_epsilon,
    })
    print(f"{case}: {size} bytes, softmax scale {attention.scaling:.6f}, rope scale {rotary.attention_scaling:.6f}, "
          f"selection margin {check.margin:.1e}")
    return True


if __name__ == "__main__":
    for wanted in sys.argv[1:] or CASES:
        write_case(wanted)
