"""Live parity with transformers on random small configurations; driven by packages/deepseek/scripts/parity.ts.

    parity.py export DIR SEED ...   writes DIR/<seed>/theirs/ (a checkpoint) and theirs.safetensors, theirs.json: ids, labels,
                                    logits, losses, every gradient; seeds 4, 9, ... are Llama, 3, 13, ... Youtu, 8, 18, ... GLM, 6, 16, ...
                                    V3.2, 7, 17, ... GLM-5; of the others even ones are V3, odd ones V2
    parity.py check DIR SEED ...    opens DIR/<seed>/{back,ours}/ (checkpoints written by @moe/deepseek) without one missing or
                                    unexpected key; back must be theirs bit for bit, ours have the logits of ours.logits/
    parity.py generate DIR SEED ... writes DIR/<seed>/theirs/ and generate.json: 200 tokens of greedy generate()

Prints one JSON line per seed. A case whose routing, selection of keys or likeliest token is too close to a tie is drawn
again, so that rounding cannot decide.
"""

import json
import random
import sys
from pathlib import Path

import torch
from fixture_file import deterministic, save_record
from safetensors.torch import load_file, save_file
from selection import SelectionCheck
from transformers import YoutuConfig
from whole_model import (
    FAMILIES, MTP_WEIGHT, YARN, Joint, RoutingCheck, family_of, gradients, make_batch, make_config, on_disk, open_strictly,
    randomize,
)

MIN_MARGIN = 2e-5
MIN_SELECTION_MARGIN = 2e-6
SPARSE = ("v32", "dsa")
MIN_GAP = 1e-3  # between the two likeliest tokens, in logits


def draw_dense_fields(r):
    heads = r.choice([2, 4])
    fields = dict(
        vocab_size=r.choice([40, 64]), hidden_size=heads * r.choice([8, 12]), intermediate_size=r.choice([20, 32]),
        num_hidden_layers=r.choice([1, 2, 3]), num_attention_heads=heads, num_key_value_heads=r.choice([1, 2, heads]),
        max_position_embeddings=512, bos_token_id=0, eos_token_id=None, rms_norm_eps=r.choice([1e-6, 1e-5]),
        tie_word_embeddings=r.random() < 0.25, rope_parameters=dict(rope_type="default", rope_theta=r.choice([10000.0, 50000.0])),
    )
    if r.random() < 0.3:
        fields["head_dim"] = r.choice([6, 16])
    return fields


def draw_fields(family, r):
    if family == "llama":
        return draw_dense_fields(r)
    groups = r.choice([1, 2, 4])
    heads = r.choice([1, 2, 4])
    layers = r.choice([1, 3, 4, 5] if family == "dsa" else [1, 2, 2, 3])
    fields = dict(
        vocab_size=r.choice([40, 64]), hidden_size=heads * r.choice([8, 12]), intermediate_size=r.choice([20, 32]),
        moe_intermediate_size=r.choice([4, 8]), num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, n_shared_experts=r.choice([0, 1, 2]), n_routed_experts=8,
        routed_scaling_factor=r.choice([1.0, 2.5]), kv_lora_rank=r.choice([8, 16]), q_lora_rank=r.choice([None, 12]),
        qk_rope_head_dim=r.choice([4, 8]), qk_nope_head_dim=r.choice([8, 12]), v_head_dim=r.choice([8, 12]),
        n_group=groups, topk_group=r.randint(1, groups), first_k_dense_replace=r.choice([0, 0, 1, layers]),
        max_position_embeddings=512, rope_theta=r.choice([10000.0, 50000.0]), bos_token_id=0, eos_token_id=None,
        rms_norm_eps=r.choice([1e-6, 1e-5]), tie_word_embeddings=r.random() < 0.25,
    )
    reachable = 8 // groups * fields["topk_group"]
    fields["num_experts_per_tok"] = r.randint(1, min(3, reachable))
    if r.random() < 0.4:
        fields["rope_scaling"] = dict(YARN, factor=r.choice([4.0, 40.0]), **r.choice(
            [dict(mscale=1.0, mscale_all_dim=1.0), dict(mscale=0.707, mscale_all_dim=0.707), dict(mscale=0.5, mscale_all_dim=0.8)]))
        fields["max_position_embeddings"] = 163840
    if family == "v2":
        fields["topk_method"] = "greedy" if groups == 1 else "group_limited_greedy"
        return fields
    fields |= dict(norm_topk_prob=r.random() < 0.7, num_nextn_predict_layers=r.choice([0, 1, 2]))
    if family in SPARSE:
        # With fewer heads, the scores of too many keys are exactly 0: ties.
        fields |= dict(
            q_lora_rank=12, index_topk=r.choice([1, 3, 4, 7, 11, 30]), index_n_heads=r.choice([6, 8, 9]),
            index_head_dim=fields["qk_rope_head_dim"] + r.choice([0, 2, 8]), scoring_func="sigmoid", topk_method="noaux_tc")
    else:
        fields["rope_interleave"] = r.random() < 0.8
    if family == "dsa":
        fields["num_nextn_predict_layers"] = 0  # MtpModel cannot run its layers, which return a pair
        fields |= dict(index_topk_freq=r.choice([1, 2, 3]), index_skip_topk_offset=r.choice([1, 2]))
    if family in ("glm", "dsa"):
        dense = fields["first_k_dense_replace"]
        fields["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (layers - dense)
    if family == "mistral":
        del fields["num_nextn_predict_layers"], fields["rope_theta"]
        theta, context = r.choice([10000.0, 50000.0]), r.choice([4, 32])
        fields.pop("rope_scaling", None)
        fields["rope_parameters"] = dict(
            YARN, rope_theta=theta, factor=16.0, original_max_position_embeddings=context, mscale=1.0, mscale_all_dim=1.0,
            llama_4_scaling_beta=0.1)
        fields |= dict(n_group=1, topk_group=1, n_shared_experts=r.choice([1, 2]), pad_token_id=None)
    if family == "youtu":
        known = {*YoutuConfig().to_dict(), "rope_theta", "rope_scaling"}
        return {key: value for key, value in fields.items() if key in known}
    return fields


def family_of_seed(seed):
    if seed % 5 == 4:
        return "llama"
    return {3: "youtu", 5: "mistral", 6: "v32", 7: "dsa", 8: "glm"}.get(seed % 10, ("v3", "v2")[seed % 2])


def draw(seed, accept):
    """The first model of a seed's configuration whose weights `accept` finds far from ties: (joint, what accept returned)."""
    family, r = family_of_seed(seed), random.Random(seed)
    fields, bias = draw_fields(family, r), r.choice(["zero", "mixed", "negative"])
    for attempt in range(100):
        deterministic(1000 * seed + attempt)
        config = make_config(family, fields)
        joint = Joint(config).eval()
        randomize(joint, torch.Generator().manual_seed(1000 * seed + attempt), bias)
        check = RoutingCheck(config)
        check.watch(joint)
        selection = SelectionCheck()
        found = accept(joint, config, selection, r)
        if found is not None and check.margin >= MIN_MARGIN and selection.margin >= MIN_SELECTION_MARGIN:
            return joint, config, found
    raise SystemExit(f"seed {seed}: no weights far enough from a tie")


def write(joint, config, folder):
    weights, config_json = on_disk(joint, config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().clone() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    save_record(folder / "config.json", config_json)


def export(folder, seed):
    def run(joint, config, selection, r):
        selection.watch(joint)
        batch = make_batch(config, torch.Generator().manual_seed(seed), 4 if seed % 4 >= 2 else 0)
        joint.zero_grad()
        return batch, *joint(*batch)

    joint, config, (batch, loss, named) = draw(seed, run)
    loss.backward()
    write(joint, config, folder / "theirs")
    tensors = {"input_ids": batch[0].int(), "labels": batch[1].int()}
    tensors |= {k: v.detach() for k, v in named.items() if v.ndim > 0}
    tensors |= {f"grad.{k}": v for k, v in gradients(joint, config).items()}
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "theirs.safetensors")
    return {"family": family_of(config), "loss": loss.item(), "mtpWeight": MTP_WEIGHT, "parameters": sum(p.numel() for p in joint.parameters())}


def check(folder, seed):
    theirs, back = load_file(folder / "theirs/model.safetensors"), load_file(folder / "back/model.safetensors")
    assert theirs.keys() == back.keys(), f"keys differ: {sorted(theirs.keys() ^ back.keys())}"
    for key, t in theirs.items():
        assert torch.equal(t, back[key]), f"{key} differs"
    expected = load_file(folder / "theirs.safetensors")
    with torch.no_grad():
        labels = expected["labels"].long()
        again = open_strictly(folder / "back")(expected["input_ids"].long(), labels, (labels != -100).long())[1]["logits"]
        assert (again - expected["logits"]).norm() <= 1e-5 * expected["logits"].norm(), "logits differ after the round trip"
        ours = open_strictly(folder / "ours")
        routing = RoutingCheck(ours.main.config)
        selection = SelectionCheck()
        routing.watch(ours)
        selection.watch(ours)
        tensors = load_file(folder / "ours.logits/model.safetensors")
        ids = tensors["input_ids"].long()
        logits = ours(ids, ids.clone(), None)[1]["logits"]
    error = ((logits - tensors["logits"]).norm() / logits.norm()).item()
    if routing.margin < MIN_MARGIN / 10 or selection.margin < MIN_SELECTION_MARGIN / 10:
        return {"logits": None, "margin": min(routing.margin, selection.margin)}
    return {"logits": error}


def generate(folder, seed):
    def run(joint, config, selection, r):
        prompt = torch.randint(2, config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(seed))
        out = joint.main.generate(
            prompt, max_new_tokens=200, do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True,
            pad_token_id=0)
        best = torch.stack(out.logits).topk(2, dim=-1).values
        if (best[..., 0] - best[..., 1]).min() < MIN_GAP:
            return None
        # The check of a selection knows no cache: it sees the same selections in one pass over the text.
        selection.watch(joint)
        with torch.no_grad():
            joint.main(input_ids=out.sequences, use_cache=False)
        return prompt[0].tolist(), out.sequences[0, prompt.shape[1]:].tolist()

    joint, config, (prompt, made) = draw(seed, run)
    write(joint, config, folder / "theirs")
    save_record(folder / "generate.json", {"prompt": prompt, "made": made})
    return {"tokens": len(made), "distinct": len(set(made))}


if __name__ == "__main__":
    what, root, *seeds = sys.argv[1:]
    for seed in seeds:
        try:
            result = {"export": export, "check": check, "generate": generate}[what](Path(root) / seed, int(seed))
        except Exception as error:  # the caller reports it beside the seed
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"seed": int(seed), **result}), flush=True)
