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

import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from fixture_file import ROOT, deterministic, provenance, save_record, save_tensors
from released_gate import margin, v3_choice, v3_gate
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()

MIN_MARGIN = 1e-4
MTP_WEIGHT = 0.3
ADAMW = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weightDecay": 0.1, "clipNorm": 1.0, "steps": 10}
OUT = ROOT / "packages/deepseek/fixtures"

BASE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=40, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, routed_scaling_factor=2.5,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=12, qk_nope_head_dim=8, n_group=4, topk_group=2,
    num_experts_per_tok=3, first_k_dense_replace=1, max_position_embeddings=64, num_nextn_predict_layers=0,
    rope_theta=10000.0, bos_token_id=0, eos_token_id=1,
)
YARN = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, original_max_position_embeddings=4096)

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
}


def randomize(model, generator, bias):
    """Weights large enough that every parameter matters to the logits; norm weights away from 1."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.2 * noise)
            elif p.numel() > 0:
                gain = 0.5 if "embed" in name else 1.5 / p.shape[-1] ** 0.5
                p.copy_(gain * noise)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                noise = torch.rand(b.shape, generator=generator)
                b.copy_({"zero": 0 * noise, "mixed": 0.4 * noise - 0.2, "negative": -1.5 - noise}[bias])


class RoutingCheck:
    """Watches every gate of a model: compares with the released rule, keeps the smallest margin and the last decisions."""

    def __init__(self, config):
        self.config, self.margin, self.seen, self.trapped = config, float("inf"), {}, 0

    def watch(self, model):
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda m, _, out, key=name: self.check(key, m, out))

    def check(self, key, gate, out):
        c = self.config
        logits, weights, ids = (t.detach() for t in out)
        bias = gate.e_score_correction_bias
        ids, order = ids.sort(dim=-1)
        weights = weights.gather(1, order)
        rule = dict(groups=c.n_group, kept_groups=c.topk_group, top_k=c.num_experts_per_tok,
                    norm_topk_prob=c.norm_topk_prob, scale=c.routed_scaling_factor)
        expected_ids, expected_weights = v3_gate(logits, bias, **rule)
        if not torch.equal(ids, expected_ids) or not torch.allclose(weights, expected_weights, rtol=1e-6, atol=0):
            raise SystemExit(f"{key}: this version of transformers departs from the released gate; fixture not written")
        choice, groups = v3_choice(logits, bias, c.n_group, c.topk_group)
        self.margin = min(self.margin, margin(choice, groups, c.topk_group, c.num_experts_per_tok))
        zero_masked = choice.masked_fill(choice.isinf(), 0.0).topk(c.num_experts_per_tok, dim=-1).indices.sort(dim=-1).values
        self.trapped += (zero_masked != ids).any(-1).sum().item()
        self.seen[key] = (logits.clone(), ids.clone(), weights.clone())


class Joint(torch.nn.Module):
    """The main model and, if there is one, its MTP layer, trained together."""

    def __init__(self, config):
        super().__init__()
        self.main = DeepseekV3ForCausalLM(config)
        self.mtp = MtpModel(self.main, 1) if config.num_nextn_predict_layers else None

    def forward(self, ids, labels, attention_mask):
        """Returns the loss to train on and every logit tensor by name."""
        out = self.main(input_ids=ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True)
        loss = cross_entropy(out.logits, labels, 1)
        named = {"logits": out.logits}
        if self.mtp is not None:
            layer, hidden = self.mtp.layers[0], out.hidden_states[-1][:, :-1]
            embedded = self.mtp.embed_tokens(ids[:, 1:])
            time = embedded.shape[1]
            positions = torch.arange(1, time + 1)[None]  # those of the embedded tokens; RoPE sees only differences
            causal = torch.full((time, time), float("-inf")).triu(1)[None, None]
            hidden = layer(embedded, hidden, self.mtp.rotary_emb(embedded, positions), causal, positions, None)
            named["mtp_logits"] = self.mtp.shared_head(hidden)
            named["mtp_loss"] = cross_entropy(named["mtp_logits"], labels, 2)
            named["main_loss"] = loss
            loss = loss + MTP_WEIGHT * named["mtp_loss"]
        return loss, named


def cross_entropy(logits, labels, shift):
    """Mean over the labels that are `shift` tokens ahead; logits may be shorter than labels."""
    target = labels[:, shift:]
    return F.cross_entropy(logits[:, : target.shape[1]].flatten(0, 1), target.flatten(), ignore_index=-100)


def on_disk(joint, config):
    """State dict under the names and in the layout that save_pretrained writes, MTP layer included, without empty tensors."""
    with tempfile.TemporaryDirectory() as folder:
        joint.main.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        config_json = json.loads((Path(folder) / "config.json").read_text())
    if joint.mtp is not None:
        prefix = f"model.layers.{config.num_hidden_layers}."
        for name, t in joint.mtp.layers[0].state_dict().items():
            name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
            if name == "mlp.experts.gate_up_proj":
                for e, stacked in enumerate(t):
                    gate, up = stacked.chunk(2)
                    tensors[f"{prefix}mlp.experts.{e}.gate_proj.weight"] = gate
                    tensors[f"{prefix}mlp.experts.{e}.up_proj.weight"] = up
            elif name == "mlp.experts.down_proj":
                tensors |= {f"{prefix}mlp.experts.{e}.down_proj.weight": one for e, one in enumerate(t)}
            else:
                tensors[prefix + name] = t
        tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"]
    return {k: v for k, v in tensors.items() if v.numel() > 0}, config_json


def gradients(joint, config):
    """Gradients under the on-disk names: a copy of the model whose parameters are its gradients, saved the same way."""
    twin = copy.deepcopy(joint)
    with torch.no_grad():
        for p, source in zip(twin.parameters(), joint.parameters(), strict=True):
            p.copy_(torch.zeros_like(p) if source.grad is None else source.grad)
    copies = ("e_score_correction_bias", "shared_head.head.weight")
    tensors, _ = on_disk(twin, config)
    mtp_embedding = f"model.layers.{config.num_hidden_layers}.embed_tokens.weight"
    return {k: v for k, v in tensors.items() if not k.endswith(copies) and k != mtp_embedding}


def adamw_losses(joint, batch, decay_vectors):
    """Loss before each of ten steps on the same batch, and the global gradient norm before clipping."""
    twin = copy.deepcopy(joint)
    parameters = [p for p in twin.parameters() if p.numel() > 0]
    decay = lambda p: ADAMW["weightDecay"] if decay_vectors or p.ndim > 1 else 0.0
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decay(p)} for p in parameters],
        lr=ADAMW["lr"], betas=tuple(ADAMW["betas"]), eps=ADAMW["eps"])
    losses, norms = [], []
    for _ in range(ADAMW["steps"]):
        optimizer.zero_grad()
        loss, _ = twin(*batch)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, ADAMW["clipNorm"]).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def make_batch(config, generator, pad):
    ids = torch.randint(2, config.vocab_size, (2, 12), generator=generator)
    labels, attention_mask = ids.clone(), None
    if pad:
        attention_mask = torch.ones_like(ids)
        attention_mask[1, -pad:] = 0
        ids[1, -pad:] = config.eos_token_id
        labels[1, -pad:] = -100
    return ids, labels, attention_mask


def check_reload(joint, folder, batch, named):
    """What was written opens in transformers with the same logits."""
    again = DeepseekV3ForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    config = again.config
    with torch.no_grad():
        logits = again(input_ids=batch[0], attention_mask=batch[2]).logits
    assert torch.equal(logits, named["logits"]), f"reloaded logits differ: {(logits - named['logits']).abs().max()}"
    if joint.mtp is not None:
        again._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\."]
        loaded = MtpModel.from_pretrained(again)
        for (name, a), b in zip(loaded.layers.state_dict().items(), joint.mtp.layers.state_dict().values(), strict=True):
            assert torch.equal(a, b), f"MTP weight {name} differs after reloading"


def write_case(case):
    spec = CASES[case]
    for seed in range(1, 1000):
        deterministic(seed)
        generator = torch.Generator().manual_seed(seed)
        config = DeepseekV3Config(**{**BASE, **copy.deepcopy(spec["config"])})
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"
        check = RoutingCheck(config)
        joint = Joint(config).eval()
        randomize(joint, generator, spec["bias"])
        batch = make_batch(config, generator, spec.get("pad", 0))
        check.watch(joint)
        loss, named = joint(*batch)
        seen, trapped = dict(check.seen), check.trapped
        loss.backward()
        all_losses, norms = adamw_losses(joint, batch, decay_vectors=True)
        matrix_losses, _ = adamw_losses(joint, batch, decay_vectors=False)
        if check.margin >= MIN_MARGIN:
            break
    else:
        raise SystemExit(f"{case}: no seed below 1000 keeps routing {MIN_MARGIN} away from a tie")

    if spec["bias"] == "negative" and trapped == 0:
        raise SystemExit(f"{case}: a zero mask would pass")
    folder = OUT / f"v3-{case}"
    shutil.rmtree(folder, ignore_errors=True)
    weights, config_json = on_disk(joint, config)
    sizes = [save_tensors(folder / "model.safetensors", weights)]
    save_record(folder / "config.json", config_json)
    check_reload(joint, folder, batch, named)
    ids, labels, attention_mask = batch
    expected = {"input_ids": ids.int(), "labels": labels.int()}
    if attention_mask is not None:
        expected["attention_mask"] = attention_mask.int()
    expected |= {k: v for k, v in named.items() if v.ndim > 0}
    expected |= {f"grad.{k}": v for k, v in gradients(joint, config).items()}
    for name, (logits, chosen, route) in seen.items():
        layer = config.num_hidden_layers if name.startswith("mtp.") else int(name.split(".")[3])
        expected |= {f"router.{layer}.logits": logits, f"router.{layer}.ids": chosen.int(),
                     f"router.{layer}.weights": route}
    sizes.append(save_tensors(folder / "expected.safetensors", expected))
    record = {
        "about": spec["note"],
        **provenance(seed),
        "config": "config.json",
        "loss": loss.item(),
        **{k: v.item() for k, v in named.items() if v.ndim == 0},
        "gradNorm": norms[0],
        "adamw": {**ADAMW, "losses": all_losses, "gradNorms": norms, "lossesDecayMatricesOnly": matrix_losses},
        "routingMargin": check.margin if check.margin < float("inf") else None,
        "tokensThatAZeroMaskWouldMisroute": trapped,
        "released": "every routing decision, ten steps included, was compared with tools/reference/released_gate.py",
    }
    if joint.mtp is not None:
        record["mtpWeight"] = MTP_WEIGHT
    save_record(folder / "fixture.json", record)
    print(f"{folder.relative_to(ROOT)}: seed {seed}, margin {check.margin:.1e}, loss {loss.item():.4f} -> "
          f"{all_losses[-1]:.4f}, {sizes} bytes")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or CASES:
        write_case(wanted)
