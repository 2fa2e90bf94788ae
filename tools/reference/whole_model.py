"""Whole DeepSeek models from transformers in f32 on random weights: the part that fixtures and live parity share."""

import contextlib
import copy
import json
import shutil
import tempfile
from pathlib import Path

import torch
from fixture_file import ROOT, deterministic, provenance, save_record, save_tensors
from released_gate import margin, v2_choice, v2_gate, v3_choice, v3_gate
from safetensors.torch import load_file
from selection import SelectionCheck
from torch.nn import functional as F
from transformers import (
    DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM, DeepseekV32Config,
    DeepseekV32ForCausalLM, Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, GlmMoeDsaConfig, GlmMoeDsaForCausalLM, LlamaConfig,
    LlamaForCausalLM, Mistral4Config, Mistral4ForCausalLM, YoutuConfig, YoutuForCausalLM,
)
from transformers.modeling_layers import MtpModel
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()

MIN_MARGIN = 1e-4
MTP_WEIGHT = 0.3
ADAMW = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weightDecay": 0.1, "clipNorm": 1.0, "steps": 10}
OUT = ROOT / "packages/deepseek/fixtures"
FAMILIES = {
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM), "v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM), "glm": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM),
    "youtu": (YoutuConfig, YoutuForCausalLM), "v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "dsa": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM), "mistral": (Mistral4Config, Mistral4ForCausalLM),
}
YARN = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, original_max_position_embeddings=4096)


def make_config(family, fields):
    config = FAMILIES[family][0](**copy.deepcopy(fields))
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def family_of(config):
    return next(family for family, (made, _) in FAMILIES.items() if type(config) is made)


@contextlib.contextmanager
def knowing_mtp(config):
    """The classes of GLM and V3.2 know nothing of the MTP layers that their files have: they are told while these are made."""
    told = {} if hasattr(config, "num_mtp_layers") else {
        "num_mtp_layers": config.num_nextn_predict_layers,
        "mtp_mlp_layer_types": ["sparse"] * config.num_nextn_predict_layers,
    }
    if getattr(config, "layer_types", None):
        told["mtp_layer_types"] = config.layer_types[-1:] * config.num_nextn_predict_layers
    for name, value in told.items():
        setattr(config, name, value)
    yield
    for name in told:
        delattr(config, name)


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
        ids, order = ids.sort(dim=-1)
        weights = weights.gather(1, order)
        rule = dict(groups=c.n_group, kept_groups=c.topk_group, top_k=c.num_experts_per_tok,
                    norm_topk_prob=c.norm_topk_prob, scale=c.routed_scaling_factor)
        if hasattr(gate, "e_score_correction_bias"):
            bias = gate.e_score_correction_bias
            expected_ids, expected_weights = v3_gate(logits, bias, **rule)
            choice, groups = v3_choice(logits, bias, c.n_group, c.topk_group)
        else:
            if getattr(c, "topk_method", "greedy") == "greedy":
                rule |= dict(groups=1, kept_groups=1)
            expected_ids, expected_weights = v2_gate(logits, **rule)
            choice, groups = v2_choice(logits, rule["groups"], rule["kept_groups"])
        if not torch.equal(ids, expected_ids) or not torch.allclose(weights, expected_weights, rtol=1e-6, atol=0):
            raise SystemExit(f"{key}: this version of transformers departs from the released gate; fixture not written")
        self.margin = min(self.margin, margin(choice, groups, rule["kept_groups"], c.num_experts_per_tok))
        zero_masked = choice.masked_fill(choice.isinf(), 0.0).topk(c.num_experts_per_tok, dim=-1).indices.sort(dim=-1).values
        self.trapped += (zero_masked != ids).any(-1).sum().item()
        self.seen[key] = (logits.clone(), ids.clone(), weights.clone())


class Joint(torch.nn.Module):
    """The main model and, if there is one, its MTP layer, trained together."""

    def __init__(self, config):
        super().__init__()
        self.main = FAMILIES[family_of(config)][1](config)
        depth = getattr(config, "num_nextn_predict_layers", 0)
        self.mtp = None
        if depth:
            with knowing_mtp(self.main.config):
                self.mtp = MtpModel(self.main, depth)

    def forward(self, ids, labels, attention_mask):
        """Returns the loss to train on and every logit tensor by name."""
        out = self.main(input_ids=ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True)
        loss = cross_entropy(out.logits, labels, 1)
        named = {"logits": out.logits}
        if self.mtp is not None:
            hidden, depths = out.hidden_states[-1], []
            for k, layer in enumerate(self.mtp.layers, 1):
                embedded, hidden = self.mtp.embed_tokens(ids[:, k:]), hidden[:, :-1]
                time = embedded.shape[1]
                positions = torch.arange(k, time + k)[None]  # those of the embedded tokens; RoPE sees only differences
                causal = torch.full((time, time), float("-inf")).triu(1)[None, None]
                hidden = layer(embedded, hidden, self.mtp.rotary_emb(embedded, positions), causal, positions, None)
                logits = self.mtp.shared_head(hidden)
                named["mtp_logits" if k == 1 else f"mtp_logits_{k}"] = logits
                depths.append(cross_entropy(logits, labels, k + 1))
            named["mtp_loss"] = torch.stack(depths).mean()
            named["main_loss"] = loss
            loss = loss + MTP_WEIGHT * named["mtp_loss"]
        return loss, named


def cross_entropy(logits, labels, shift):
    """Mean over the labels that are `shift` tokens ahead; logits may be shorter than labels."""
    target = labels[:, shift:]
    return F.cross_entropy(logits[:, : target.shape[1]].flatten(0, 1), target.flatten(), ignore_index=-100)


def on_disk(joint, config):
    """State dict under the names and in the layout that save_pretrained writes, MTP layers included."""
    with tempfile.TemporaryDirectory() as folder:
        joint.main.save_pretrained(folder)
        tensors = load_file(Path(folder) / "model.safetensors")
        config_json = json.loads((Path(folder) / "config.json").read_text())
    for k, layer in enumerate(joint.mtp.layers if joint.mtp else []):
        prefix = f"model.layers.{config.num_hidden_layers + k}."
        for name, t in layer.state_dict().items():
            name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
            tensors |= one_by_one(prefix + name, t)
        tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
        # A tied head is not in the file; the released layout repeats it inside each MTP layer all the same.
        tensors[f"{prefix}shared_head.head.weight"] = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    return tensors, config_json


def one_by_one(name, t):
    """A tensor under its name; the matrices of stacked experts under a name each."""
    prefix, _, projection = name.rpartition(".")
    if not prefix.endswith("mlp.experts"):
        return {name: t}
    if projection == "down_proj":
        return {f"{prefix}.{e}.down_proj.weight": one for e, one in enumerate(t)}
    halves = [stacked.chunk(2) for stacked in t]
    return {f"{prefix}.{e}.{which}_proj.weight": half for e, pair in enumerate(halves) for which, half in zip(("gate", "up"), pair)}


def gradients(joint, config):
    """Gradients under the on-disk names: a copy of the model whose parameters are its gradients, saved the same way.

    The indexers of sparse attention have none in transformers."""
    twin = copy.deepcopy(joint)
    with torch.no_grad():
        for p, source in zip(twin.parameters(), joint.parameters(), strict=True):
            p.copy_(torch.zeros_like(p) if source.grad is None else source.grad)
    copies = ("e_score_correction_bias", "shared_head.head.weight")
    tensors, _ = on_disk(twin, config)
    own = lambda key: not key.endswith(copies) and ".indexer." not in key and not (key.startswith("model.layers.") and key.endswith(".embed_tokens.weight"))
    apart = {k: v for name, t in tensors.items() for k, v in one_by_one(name, t).items()}
    return {k: v for k, v in apart.items() if own(k) and v.numel() > 0}


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
        ids[1, -pad:] = 1 if config.eos_token_id is None else config.eos_token_id
        labels[1, -pad:] = -100
    return ids, labels, attention_mask


def open_strictly(folder):
    """Opens a checkpoint in transformers, MTP layers included; fails on any key that neither part has a place for."""
    architecture = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    family = next(name for name, (_, model) in FAMILIES.items() if model.__name__ == architecture)
    main, info = FAMILIES[family][1].from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", output_loading_info=True)
    config = main.config
    layers = range(config.num_hidden_layers, config.num_hidden_layers + (getattr(config, "num_nextn_predict_layers", 0) or 0))
    of_mtp = tuple(f"model.layers.{layer}." for layer in layers)
    problems = {what: sorted(keys) for what, keys in info.items() if what != "unexpected_keys" and keys}
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(of_mtp))
    if unexpected:
        problems["unexpected_keys"] = unexpected
    if problems:
        raise ValueError(f"{folder}: {problems}")
    joint = Joint.__new__(Joint)
    torch.nn.Module.__init__(joint)
    joint.main, joint.mtp = main, None
    if layers:
        main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layer}\." for layer in layers]
        with knowing_mtp(config):
            joint.mtp = MtpModel.from_pretrained(main)  # raises when a key is missing
    return joint.eval()


def check_reload(joint, folder, batch, named):
    """What was written opens in transformers with the same logits."""
    again = open_strictly(folder)
    with torch.no_grad():
        logits = again.main(input_ids=batch[0], attention_mask=batch[2]).logits
    assert torch.equal(logits, named["logits"]), f"reloaded logits differ: {(logits - named['logits']).abs().max()}"
    if joint.mtp is not None:
        for (name, a), b in zip(again.mtp.layers.state_dict().items(), joint.mtp.layers.state_dict().values(), strict=True):
            assert torch.equal(a, b), f"MTP weight {name} differs after reloading"


def write_case(family, case, base, spec):
    """Writes packages/deepseek/fixtures/<family>-<case>/ for a model of the fields of `base` with those of the case over them."""
    for seed in range(1, 1000):
        deterministic(seed)
        generator = torch.Generator().manual_seed(seed)
        config = make_config(family, {**base, **spec["config"]})
        check = RoutingCheck(config)
        joint = Joint(config).eval()
        randomize(joint, generator, spec.get("bias"))
        batch = make_batch(config, generator, spec.get("pad", 0))
        selection = SelectionCheck()
        check.watch(joint)
        selection.watch(joint)
        loss, named = joint(*batch)
        seen, trapped = dict(check.seen), check.trapped
        loss.backward()
        all_losses, norms = adamw_losses(joint, batch, decay_vectors=True)
        matrix_losses, _ = adamw_losses(joint, batch, decay_vectors=False)
        if min(check.margin, selection.margin) >= MIN_MARGIN:
            break
    else:
        raise SystemExit(f"{case}: no seed below 1000 keeps routing and selection {MIN_MARGIN} away from a tie")

    if spec.get("bias") == "negative" and trapped == 0:
        raise SystemExit(f"{case}: a zero mask would pass")
    folder = OUT / f"{family}-{case}"
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
    if selection.margin < float("inf"):
        record["selectionMargin"] = selection.margin
    if joint.mtp is not None:
        record["mtpWeight"] = MTP_WEIGHT
    save_record(folder / "fixture.json", record)
    print(f"{folder.relative_to(ROOT)}: seed {seed}, margin {check.margin:.1e}, loss {loss.item():.4f} -> "
          f"{all_losses[-1]:.4f}, {sizes} bytes")
