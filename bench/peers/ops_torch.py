"""Peer of `pnpm bench ops`: the same ops in PyTorch's eager mode, at the same shapes.

    .venv-reference/bin/python bench/peers/ops_torch.py --json

With --json the last line of output is one JSON object; seconds are medians. A backward pass is timed as forward and backward less forward.
"""

import argparse
import json
import os
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tokens", type=int, default=2048)
parser.add_argument("--seconds", type=float, default=0.2, help="time spent on each op")
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--json", action="store_true")
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch
from torch.nn import functional as F

HIDDEN, VOCABULARY, EXPERTS, CHOSEN, INNER, HEADS, QUERY, ROPE, VALUE, TIME = 256, 4096, 16, 4, 128, 8, 48, 16, 32, 256
results = []


def median_seconds(fn):
    fn()
    times, end = [], time.perf_counter() + args.seconds
    while len(times) < 5 or time.perf_counter() < end:
        started = time.perf_counter()
        fn()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(name, fn, inputs, gradient=None):
    """Times fn(*inputs), and with `gradient` (that of its result) its backward pass."""
    with torch.no_grad():
        forward = median_seconds(lambda: fn(*inputs))
    results.append({"name": name, "seconds": forward})
    if gradient is None:
        return
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in leaves if x.is_floating_point()]
    recorded = median_seconds(lambda: fn(*leaves))
    both = median_seconds(lambda: torch.autograd.grad(fn(*leaves), wanted, gradient))
    results.append({"name": f"{name} backward", "seconds": max(both - recorded, 1e-9)})


def rand(*shape):
    return torch.rand(*shape) - 0.5


def rope(x, cos, sin):
    kept, turned = x.split([QUERY - ROPE, ROPE], dim=-1)
    a, b = turned[..., 0::2], turned[..., 1::2]
    c, s = cos[None, :, None], sin[None, :, None]
    return torch.cat([kept, torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)], dim=-1)


def route(logits, bias):
    """As transformers' DeepseekV3TopkRouter."""
    scores = logits.sigmoid()
    choice = scores + bias
    groups = choice.view(-1, 4, EXPERTS // 4).topk(2, dim=-1)[0].sum(dim=-1)
    kept = torch.zeros_like(groups).scatter_(1, groups.topk(2, dim=-1, sorted=False)[1], 1)
    mask = kept.unsqueeze(-1).expand(-1, 4, EXPERTS // 4).reshape(-1, EXPERTS)
    indices = choice.masked_fill(~mask.bool(), 0.0).topk(CHOSEN, dim=-1, sorted=False)[1]
    weights = scores.gather(1, indices)
    return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * 2.5


def main():
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tokens, batch, slots = args.tokens, args.tokens // TIME, args.tokens * CHOSEN
    measure("rmsNorm", lambda x, w: F.rms_norm(x, (HIDDEN,), w, 1e-6), [rand(tokens, HIDDEN), rand(HIDDEN)], rand(tokens, HIDDEN))
    measure("swiglu", lambda a, b: F.silu(a) * b, [rand(slots, INNER), rand(slots, INNER)], rand(slots, INNER))
    with torch.no_grad():
        measure("rope", rope, [rand(batch, TIME, HEADS, QUERY), rand(TIME, ROPE // 2), rand(TIME, ROPE // 2)])
    q, k, v = rand(batch, HEADS, TIME, QUERY), rand(batch, HEADS, TIME, QUERY), rand(batch, HEADS, TIME, VALUE)
    attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    measure("attention", attend, [q, k, v], rand(batch, HEADS, TIME, VALUE))
    targets = torch.randint(0, VOCABULARY, (tokens,))
    head = lambda x, w: F.cross_entropy(x @ w.t(), targets, reduction="none")
    measure("loss of the head", head, [rand(tokens, HIDDEN), rand(VOCABULARY, HIDDEN)], rand(tokens))
    measure("router top-k", route, [rand(tokens, EXPERTS), rand(EXPERTS)])
    indices = torch.randint(0, EXPERTS, (tokens, CHOSEN))
    measure("dispatch plan", lambda i: (torch.sort(i.flatten(), stable=True), torch.bincount(i.flatten(), minlength=EXPERTS)), [indices])
    order = torch.sort(indices.flatten(), stable=True)[1]
    positions = torch.argsort(order)
    measure("permute", lambda x: x[order // CHOSEN], [rand(tokens, HIDDEN)], rand(slots, HIDDEN))
    combine = lambda y, w: (y[positions].view(tokens, CHOSEN, HIDDEN) * w.unsqueeze(-1)).sum(dim=1)
    measure("combine", combine, [rand(slots, HIDDEN), rand(tokens, CHOSEN)], rand(tokens, HIDDEN))
    ids, rows = torch.randint(0, VOCABULARY, (tokens,)), rand(tokens, HIDDEN)
    measure("embedding backward", lambda s: torch.zeros(VOCABULARY, HIDDEN).index_add_(0, ids, s), [rows])
    parameter = torch.nn.Parameter(rand(2048, 2048))
    parameter.grad = rand(2048, 2048)
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    results.append({"name": "AdamW", "seconds": median_seconds(optimizer.step)})
    measure("global norm", torch.linalg.vector_norm, [rand(2048, 2048)])
    if args.json:
        print(json.dumps({"results": results}))
    else:
        for result in results:
            print(f"{result['name']:28} {1000 * result['seconds']:9.3f} ms")


main()
