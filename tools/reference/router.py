"""Fixtures of the mixture-of-experts block alone, computed by the released gates (released_gate.py) and plain torch.

    .venv-reference/bin/python tools/reference/router.py [CASE ...]

writes packages/router/fixtures/<case>.safetensors and <case>.json. Tensors (B batch, T time, D hidden, E experts, K chosen):
    hidden_states [B, T, D], gate.weight [E, D], gate.e_score_correction_bias [E] (V3 only),
    experts.<e>.{gate_proj,up_proj,down_proj}.weight, shared_experts.{gate_proj,up_proj,down_proj}.weight (if any),
    router_logits [B*T, E], ids [B*T, K] i32 ascending, weights [B*T, K] in the order of ids, counts [E] i32,
    output [B, T, D], grad_output, grad.<name> of hidden_states and of every weight.
V3 cases also hold the sequence-wise balance loss (alpha 1): seq_loss.ids [B, T, K] i32 (top-K of the unbiased scores, over
all groups), seq_loss.grad_logits [B*T, E]; its value is in the JSON.
Where the installed transformers has the block it is run on the same weights and must agree.
"""

import sys

import torch
from fixture_file import ROOT, deterministic, provenance, save_record, save_tensors
from released_gate import margin, sequence_balance_loss, v2_choice, v2_gate, v3_choice, v3_gate
from torch.nn import functional as F
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

OUT = ROOT / "packages/router/fixtures"
MIN_MARGIN = 1e-3
BASE = dict(
    hidden_size=20, moe_intermediate_size=6, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
    n_shared_experts=1, norm_topk_prob=True, routed_scaling_factor=2.5, scoring_func="sigmoid", topk_method="noaux_tc",
)
V2 = dict(scoring_func="softmax", norm_topk_prob=False, n_shared_experts=2)
CASES = {
    "v3": dict(config={}, bias="mixed", note="V3 gate, 2 of 4 groups"),
    "v3-negative-bias": dict(config={}, bias="negative", note="every choice score negative: dropped groups need -inf, not 0"),
    "v3-large-bias": dict(config={}, bias="large", note="biases near 7 that differ by less than bf16 resolves"),
    "v3-one-group": dict(config=dict(n_group=1, topk_group=1, n_shared_experts=2, routed_scaling_factor=2.446,
                                     num_experts_per_tok=3), bias="mixed", note="Moonlight: one group, two shared experts"),
    "v3-no-norm": dict(config=dict(norm_topk_prob=False, n_shared_experts=0, n_group=2, topk_group=1), bias="mixed",
                       note="weights not normalized, no shared expert"),
    "v2-greedy": dict(config=dict(V2, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0,
                                  num_experts_per_tok=3), bias=None, note="V2-Lite: softmax, plain top-k"),
    "v2-group-limited": dict(config=dict(V2, topk_method="group_limited_greedy", routed_scaling_factor=16.0), bias=None,
                             note="V2: softmax, group score is the best expert, weights times 16"),
}


def make_bias(kind, experts, g):
    noise = torch.rand(experts, generator=g)
    return {None: 0 * noise, "mixed": 0.4 * noise - 0.2, "negative": -1.5 - noise, "large": 6.95 + 0.02 * noise}[kind]


def expert(weights, prefix, x):
    gate, up, down = (weights[f"{prefix}.{p}_proj.weight"] for p in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def block(weights, hidden, bias, c):
    """The layer as one reads it in the paper: every chosen expert on its tokens, plus the shared ones on all."""
    x = hidden.flatten(0, 1)
    logits = F.linear(x, weights["gate.weight"])
    rule = dict(groups=c["n_group"], kept_groups=c["topk_group"], top_k=c["num_experts_per_tok"],
                norm_topk_prob=c["norm_topk_prob"], scale=c["routed_scaling_factor"])
    if c["scoring_func"] == "sigmoid":
        ids, route = v3_gate(logits, bias, **rule)
        choice = v3_choice(logits, bias, c["n_group"], c["topk_group"])
    else:
        ids, route = v2_gate(logits, **rule)
        choice = v2_choice(logits, c["n_group"], c["topk_group"])
    y = torch.zeros_like(x)
    for e in range(c["n_routed_experts"]):
        token, slot = (ids == e).nonzero(as_tuple=True)
        y = y.index_add(0, token, expert(weights, f"experts.{e}", x[token]) * route[token, slot, None])
    if c["n_shared_experts"]:
        y = y + expert(weights, "shared_experts", x)
    return y.view_as(hidden), logits, ids, route, choice


def compare_with_transformers(c, weights, hidden, bias, output):
    keys = {k: v for k, v in c.items() if k not in ("scoring_func", "topk_method")}
    if c["scoring_func"] == "sigmoid":
        module = DeepseekV3MoE(DeepseekV3Config(**keys)).eval()
        module.gate.e_score_correction_bias.copy_(bias)
    else:
        module = DeepseekV2Moe(DeepseekV2Config(**keys, num_attention_heads=2, topk_method=c["topk_method"])).eval()
    module.experts.config._experts_implementation = "eager"
    with torch.no_grad():
        module.gate.weight.copy_(weights["gate.weight"])
        for e in range(c["n_routed_experts"]):
            pair = [weights[f"experts.{e}.{p}_proj.weight"] for p in ("gate", "up")]
            module.experts.gate_up_proj[e].copy_(torch.cat(pair))
            module.experts.down_proj[e].copy_(weights[f"experts.{e}.down_proj.weight"])
        for p in ("gate", "up", "down") if c["n_shared_experts"] else ():
            getattr(module.shared_experts, f"{p}_proj").weight.copy_(weights[f"shared_experts.{p}_proj.weight"])
        theirs = module(hidden)
    return torch.allclose(theirs, output, rtol=1e-4, atol=1e-5)


def write_case(case):
    spec = CASES[case]
    c = {**BASE, **spec["config"]}
    d, i, experts, k = c["hidden_size"], c["moe_intermediate_size"], c["n_routed_experts"], c["num_experts_per_tok"]
    for seed in range(1, 1000):
        deterministic(seed)
        g = torch.Generator().manual_seed(seed)
        rand = lambda *shape: (1.5 * torch.randn(*shape, generator=g) / shape[-1] ** 0.5).requires_grad_()
        weights = {"gate.weight": rand(experts, d)}
        widths = {f"experts.{e}": i for e in range(experts)}
        if c["n_shared_experts"]:
            widths["shared_experts"] = i * c["n_shared_experts"]
        for prefix, width in widths.items():
            weights |= {f"{prefix}.gate_proj.weight": rand(width, d), f"{prefix}.up_proj.weight": rand(width, d),
                        f"{prefix}.down_proj.weight": rand(d, width)}
        hidden = torch.randn(2, 8, d, generator=g).requires_grad_()
        bias = make_bias(spec["bias"], experts, g)
        output, logits, ids, route, (choice, groups) = block(weights, hidden, bias, c)
        # What rounds differently must still choose alike, also for the unbiased top-K of the balance loss.
        scores = logits.sigmoid() if c["scoring_func"] == "sigmoid" else logits.softmax(-1)
        plain = margin(scores, groups[:, :1], 1, k)
        smallest = min(margin(choice, groups, c["topk_group"], k), plain)
        if smallest >= MIN_MARGIN / (100 if spec["bias"] == "large" else 1):
            break
    else:
        raise SystemExit(f"{case}: no seed below 1000 keeps routing away from a tie")
    zero_masked = choice.masked_fill(choice.isinf(), 0.0).topk(k, dim=-1).indices.sort(dim=-1).values
    trapped = (zero_masked != ids).any(-1).sum().item()
    if spec["bias"] == "negative" and trapped == 0:
        raise SystemExit(f"{case}: a zero mask would pass")
    bf16_choice = v3_choice(logits, bias.bfloat16().float(), c["n_group"], c["topk_group"])[0]
    bf16_differs = (bf16_choice.topk(k, dim=-1).indices.sort(dim=-1).values != ids).any(-1).sum().item()
    if spec["bias"] == "large" and bf16_differs == 0:
        raise SystemExit(f"{case}: a bf16 bias would pass")

    agrees = compare_with_transformers(c, weights, hidden, bias, output)
    grad_output = torch.randn(output.shape, generator=g)
    output.backward(grad_output)
    tensors = {
        "hidden_states": hidden, **weights, "router_logits": logits, "ids": ids.int(), "weights": route,
        "counts": ids.flatten().bincount(minlength=experts).int(), "output": output, "grad_output": grad_output,
        "grad.hidden_states": hidden.grad, **{f"grad.{n}": w.grad for n, w in weights.items() if w.grad is not None},
    }
    for n, w in weights.items():  # an expert without tokens has no gradient in autograd, and a zero one by definition
        tensors.setdefault(f"grad.{n}", torch.zeros_like(w))
    record = {"about": spec["note"], **provenance(seed), "config": c, "routingMargin": smallest,
              "tokensThatAZeroMaskWouldMisroute": trapped, "agreesWithInstalledTransformers": agrees}
    if c["scoring_func"] == "sigmoid":
        tensors["gate.e_score_correction_bias"] = bias
        record["tokensThatABf16BiasWouldMisroute"] = bf16_differs
        logits = logits.detach().unflatten(0, (2, 8)).requires_grad_()
        plain_ids = logits.sigmoid().topk(k, dim=-1).indices.sort(dim=-1).values
        loss = sequence_balance_loss(logits, plain_ids, alpha=1.0)
        loss.backward()
        tensors |= {"seq_loss.ids": plain_ids.int(), "seq_loss.grad_logits": logits.grad.flatten(0, 1)}
        record["sequenceBalanceLoss"] = loss.item()
    size = save_tensors(OUT / f"{case}.safetensors", tensors)
    save_record(OUT / f"{case}.json", record)
    print(f"{case}: seed {seed}, {size} bytes, margin {smallest:.1e}, zero mask misroutes {trapped}, transformers agrees: {agrees}")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or CASES:
        write_case(wanted)
