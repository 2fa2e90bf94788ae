"""Fixtures of low-rank adapters, from PEFT on transformers' DeepseekV3ForCausalLM in f32.

    .venv-reference/bin/python tools/reference/adapters.py [CASE ...]

needs `peft` (0.19 or later) and `accelerate`, which setup.sh does not install. Writes packages/deepseek/fixtures/adapters-<case>/,
for the model of fixtures/v3-base and its input_ids and labels:
    adapter_config.json         as PEFT writes it
    adapter_model.safetensors   likewise; of experts one adapter each, as under transformers 4, which PEFT converts
    expected.safetensors        logits [2, 12, vocab], grad.<key of adapter_model.safetensors> for every matrix
    fixture.json                seed, versions, command, loss, with attention alone ten AdamW losses on the same batch

The adapters of experts are fused under transformers 5 (gate and up share an A of twice the rank and a block diagonal B), so what
is trained there is more than two adapters of rank r: gradients of the blocks are compared, steps are not.
"""

import json
import shutil
import sys

import peft
import torch
from fixture_file import ROOT, deterministic, provenance, save_record, save_tensors
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from whole_model import ADAMW, MIN_MARGIN, OUT, RoutingCheck, cross_entropy, open_strictly

BASE = OUT / "v3-base"
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 3, 7


def draw(tensors, generator):
    """A of norm about 1 a row, B large enough that every adapter matters to the logits."""
    for name, t in sorted(tensors.items()):
        gain = t.shape[-1] ** -0.5 if "lora_A" in name else 0.15
        t.copy_(gain * torch.randn(t.shape, generator=generator))


def of_attention(model, generator, folder):
    """PEFT's own, saved by PEFT."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ATTENTION, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        draw({n: p for n, p in adapted.named_parameters() if "lora_" in n}, generator)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def of_experts(_, generator, folder):
    """Attention and routed experts, as PEFT writes it under transformers 4."""
    tensors = {}
    for key, weight in load_file(BASE / "model.safetensors").items():
        path = key.removesuffix(".weight")
        if path.split(".")[-1] in ATTENTION or ".mlp.experts." in path:
            tensors[f"base_model.model.{path}.lora_A.weight"] = torch.empty(RANK, weight.shape[1])
            tensors[f"base_model.model.{path}.lora_B.weight"] = torch.empty(weight.shape[0], RANK)
    draw(tensors, generator)
    save_tensors(folder / "adapter_model.safetensors", tensors)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=ATTENTION + EXPERTS, task_type="CAUSAL_LM", inference_mode=True)
    config.save_pretrained(folder)


def keyed(named, experts):
    """Tensors of the shape of PEFT's parameters under the keys of the file."""
    found = {}
    for name, t in named.items():
        key = name.replace(".default", "")
        if ".mlp.experts." not in key:
            found[key] = t
            continue
        fused = ".base_layer." in key
        layer = key[: key.index(".mlp.experts.") + len(".mlp.experts.")]
        part = "lora_A" if "lora_A" in key else "lora_B"
        if part == "lora_A":
            stack = t.reshape(experts, -1, t.shape[1])
            pieces = {"gate_proj": stack[:, :RANK], "up_proj": stack[:, RANK:]} if fused else {"down_proj": stack}
        else:
            stack = t.reshape(t.shape[0], -1, experts).permute(2, 0, 1)
            half = stack.shape[1] // 2
            pieces = ({"gate_proj": stack[:, :half, :RANK], "up_proj": stack[:, half:, RANK:]} if fused
                      else {"down_proj": stack})
        for projection, values in pieces.items():
            found |= {f"{layer}{e}.{projection}.{part}.weight": one for e, one in enumerate(values)}
    return found


CASES = {"attention": (of_attention, True), "experts": (of_experts, False)}


def write_case(case):
    make, trains = CASES[case]
    batch = load_file(BASE / "expected.safetensors")
    ids, labels = batch["input_ids"].long(), batch["labels"].long()
    folder = OUT / f"adapters-{case}"
    for seed in range(1, 1000):
        deterministic(seed)
        generator = torch.Generator().manual_seed(seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(open_strictly(BASE).main, generator, folder)
        base = open_strictly(BASE).main
        check = RoutingCheck(base.config)
        adapted = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()
        check.watch(base)
        learned = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        stored = load_file(folder / "adapter_model.safetensors")
        opened = keyed({n: p.detach() for n, p in learned.items()}, base.config.n_routed_experts)
        assert opened.keys() == stored.keys(), opened.keys() ^ stored.keys()
        for key in stored:
            assert torch.equal(opened[key], stored[key]), f"PEFT opens {key} otherwise"

        def loss_of():
            logits = adapted(input_ids=ids, use_cache=False).logits
            return logits, cross_entropy(logits, labels, 1)

        logits, loss = loss_of()
        loss.backward()
        gradients = keyed({n: p.grad.clone() for n, p in learned.items()}, base.config.n_routed_experts)
        losses = []
        if trains:
            optimizer = torch.optim.AdamW(learned.values(), lr=10 * ADAMW["lr"], betas=tuple(ADAMW["betas"]), eps=ADAMW["eps"],
                                          weight_decay=ADAMW["weightDecay"])
            for _ in range(ADAMW["steps"]):
                optimizer.zero_grad()
                _, stepped = loss_of()
                stepped.backward()
                torch.nn.utils.clip_grad_norm_(learned.values(), ADAMW["clipNorm"])
                optimizer.step()
                losses.append(stepped.item())
        if check.margin >= MIN_MARGIN:
            break
    plain = open_strictly(BASE).main(input_ids=ids).logits
    expected = {"logits": logits, **{f"grad.{k}": g for k, g in gradients.items()}}
    size = save_tensors(folder / "expected.safetensors", expected)
    # It names the folder of the base on the machine that made it.
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "../v3-base"
    save_record(folder / "adapter_config.json", config)
    record = {
        "about": f"adapters of rank {RANK}, alpha {ALPHA} beside {', '.join(sorted(config['target_modules']))}",
        **provenance(seed),
        "base": "v3-base",
        "loss": loss.item(),
        "largestChange": (logits - plain).abs().max().item(),
        "routingMargin": check.margin,
    }
    record["versions"]["peft"] = peft.__version__
    if losses:
        record["adamw"] = {**ADAMW, "lr": 10 * ADAMW["lr"], "losses": losses}
    save_record(folder / "fixture.json", record)
    print(f"{folder.relative_to(ROOT)}: seed {seed}, margin {check.margin:.1e}, loss {loss.item():.4f} {losses[-1:]}, {size} bytes")


if __name__ == "__main__":
    for wanted in sys.argv[1:] or CASES:
        write_case(wanted)
