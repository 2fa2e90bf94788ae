"""Values and gradients of single operations from torch in f32, for @moe/core.

    .venv-reference/bin/python tools/reference/core_ops.py

writes packages/core/fixtures/ops.safetensors and ops.json. Tensors are named <case>.<input or output>; a gradient is
<case>.grad.<input>, for the upstream gradient <case>.grad_output (1 where the output is a scalar). Attributes of a case
are in the JSON. Layouts: attention q, k [B, T, H, dk], v and output [B, T, H, dv], causal; RoPE turns adjacent pairs of
x [B, T, H, D] by cos, sin [T, D / 2]; linear weights are [out, in].
"""

import torch
from fixture_file import ROOT, deterministic, provenance, save_record, save_tensors
from torch.nn import functional as F

SEED = 7
OUT = ROOT / "packages/core/fixtures"
tensors, attributes = {}, {}


def case(name, fn, inputs, constants=None, **attrs):
    """Runs fn(**inputs, **constants, **attrs), records it, and the gradients of all inputs."""
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    output = fn(**leaves, **(constants or {}), **attrs)
    upstream = torch.ones(()) if output.ndim == 0 else torch.randn(output.shape, generator=g)
    output.backward(upstream)
    record = {**leaves, **(constants or {}), "output": output}
    if output.ndim:
        record["grad_output"] = upstream
    record |= {f"grad.{k}": v.grad for k, v in leaves.items()}
    for k, v in record.items():
        tensors[f"{name}.{k}"] = v.int() if v.dtype == torch.int64 else v
    attributes[name] = attrs


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    c, s = cos[None, :, None], sin[None, :, None]
    return torch.stack([even * c - odd * s, even * s + odd * c], -1).flatten(-2)


def attention(q, k, v, scale):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    time = q.shape[1]
    scores = scores.masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def cross_entropy(logits, target, ignoreIndex):
    return F.cross_entropy(logits, target, ignore_index=ignoreIndex)


def linear_cross_entropy(x, weight, target, ignoreIndex):
    return F.cross_entropy(F.linear(x, weight), target, ignore_index=ignoreIndex)


def grouped_linear(x, weight, counts):
    """Rows of x are sorted by expert; expert e owns counts[e] rows; weight [E, out, in]."""
    return torch.cat([F.linear(rows, w) for rows, w in zip(x.split(counts.tolist()), weight)])


def adamw(name, steps, lr, betas, eps, weightDecay):
    p = torch.nn.Parameter(randn(5, 7))
    optimizer = torch.optim.AdamW([p], lr=lr, betas=betas, eps=eps, weight_decay=weightDecay)
    tensors[f"{name}.param"] = p.detach().clone()
    tensors[f"{name}.grads"] = randn(steps, 5, 7)
    tensors[f"{name}.grads"][1] *= 1e-6  # small gradients show where eps stands
    history = []
    for step in range(steps):
        p.grad = tensors[f"{name}.grads"][step].clone()
        optimizer.step()
        history.append(p.detach().clone())
    state = optimizer.state[p]
    tensors[f"{name}.params"] = torch.stack(history)
    tensors[f"{name}.exp_avg"], tensors[f"{name}.exp_avg_sq"] = state["exp_avg"], state["exp_avg_sq"]
    attributes[name] = dict(steps=steps, lr=lr, betas=list(betas), eps=eps, weightDecay=weightDecay)


def clip(name, maxNorm):
    """Clipping over several tensors as torch.nn.utils.clip_grad_norm_ does it: factor maxNorm / (norm + 1e-6), at most 1."""
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in ((4, 6), (6,), (2, 3, 2))]
    for i, p in enumerate(parameters):
        p.grad = randn(*p.shape)
        tensors[f"{name}.grad.{i}"] = p.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, maxNorm)
    for i, p in enumerate(parameters):
        tensors[f"{name}.clipped.{i}"] = p.grad.clone()
    attributes[name] = dict(maxNorm=maxNorm, norm=norm.item())


def randn(*shape):
    return torch.randn(*shape, generator=g)


if __name__ == "__main__":
    deterministic(SEED)
    g = torch.Generator().manual_seed(SEED)
    target = torch.tensor([3, 0, 10, -100, 7, 4])
    angle = torch.arange(5)[:, None] * (10000.0 ** (-torch.arange(4) / 4))[None]
    case("softmax", lambda x: x.softmax(-1), {"x": 4 * randn(3, 5, 9)})
    case("softmax_large", lambda x: x.softmax(-1), {"x": 90 * randn(4, 9)})
    case("log_softmax", lambda x: x.log_softmax(-1), {"x": 4 * randn(3, 9)})
    case("rms_norm", rms_norm, {"x": randn(2, 5, 12), "weight": 1 + 0.2 * randn(12)}, eps=1e-6)
    case("rms_norm_small", rms_norm, {"x": 1e-3 * randn(4, 12), "weight": 1 + 0.2 * randn(12)}, eps=1e-5)
    case("silu", F.silu, {"input": 3 * randn(4, 9)})
    case("sigmoid", torch.sigmoid, {"input": 5 * randn(4, 9)})
    case("swiglu", lambda gate, up: F.silu(gate) * up, {"gate": 2 * randn(4, 9), "up": randn(4, 9)})
    case("rope", rope, {"x": randn(2, 5, 3, 8)}, {"cos": angle.cos(), "sin": angle.sin()})
    sizes = {"q": randn(2, 7, 3, 12), "k": randn(2, 7, 3, 12), "v": randn(2, 7, 3, 10)}
    case("attention", attention, sizes, scale=12**-0.5)
    case("cross_entropy", cross_entropy, {"logits": 3 * randn(6, 11)}, {"target": target}, ignoreIndex=-100)
    case("linear_cross_entropy", linear_cross_entropy, {"x": randn(6, 8), "weight": randn(11, 8)}, {"target": target},
         ignoreIndex=-100)
    case("linear", F.linear, {"input": randn(2, 5, 8), "weight": randn(6, 8)})
    case("embedding", lambda weight, ids: F.embedding(ids, weight), {"weight": randn(9, 6)},
         {"ids": torch.tensor([[3, 3, 0], [8, 3, 1]])})
    case("grouped_linear", grouped_linear, {"x": randn(10, 6), "weight": randn(4, 5, 6)},
         {"counts": torch.tensor([3, 0, 6, 1])})
    adamw("adamw", steps=4, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weightDecay=0.1)
    clip("clip", maxNorm=1.0)
    clip("clip_inactive", maxNorm=100.0)
    size = save_tensors(OUT / "ops.safetensors", tensors)
    save_record(OUT / "ops.json", {**provenance(SEED), "cases": attributes})
    print(f"{len(attributes)} cases, {size} bytes")
