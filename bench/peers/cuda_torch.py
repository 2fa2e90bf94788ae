"""Peer of `pnpm bench cuda`: the same figures from PyTorch (cuBLASLt, its attention, transformers' model) on the same card.

    python3 bench/peers/cuda_torch.py --json peers.json [--only peak,gemm,attention,train] [--config 1b]

Times are medians of CUDA events. Names equal those of `bench/cuda.ts`, which prints ratios.
"""

import argparse
import json
import platform
import statistics
import sys
import time

import torch

from configs import CONFIGS

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--json")
parser.add_argument("--only", default="peak,gemm,attention,train")
parser.add_argument("--config", default="1b")
parser.add_argument("--repeats", type=int, default=20)
args = parser.parse_args()
results = []


def report(name, rate, unit):
    results.append({"name": name, "rate": rate, "unit": unit})
    print(f"{name:44} {rate:9.4g} {unit}", flush=True)


def milliseconds(fn):
    for _ in range(3):
        fn()
    times = []
    for _ in range(args.repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        fn()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def random(*shape, dtype=torch.bfloat16):
    return (torch.rand(shape, device="cuda") * 2 - 1).to(dtype)


def peak():
    x = random(2**28, dtype=torch.float32)
    y = torch.empty_like(x)
    report("peak: copy", 8 * x.numel() / milliseconds(lambda: y.copy_(x)) / 1e6, "GB/s")
    a, b = random(8192, 8192), random(8192, 8192)
    report("peak: bf16 product", 2 * 8192**3 / milliseconds(lambda: a @ b.T) / 1e9, "TFLOP/s")


LINEARS = {
    "q_a_proj": (7168, 1536),
    "q_b_proj": (1536, 24576),
    "kv_a_proj": (7168, 576),
    "kv_b_proj": (512, 32768),
    "o_proj": (16384, 7168),
    "dense mlp up": (7168, 18432),
}


def gemm():
    for name, (k, n) in LINEARS.items():
        x, w, dy = random(4096, k), random(n, k), random(4096, n)
        flops = 2 * 4096 * k * n
        report(f"gemm bf16: {name} forward", flops / milliseconds(lambda: x @ w.T) / 1e9, "TFLOP/s")
        report(f"gemm bf16: {name} dW", flops / milliseconds(lambda: dy.T @ x) / 1e9, "TFLOP/s")
    a, b = random(4096, 4096, dtype=torch.float32), random(4096, 4096, dtype=torch.float32)
    report("gemm f32: 4096 square", 2 * 4096**3 / milliseconds(lambda: a @ b.T) / 1e9, "TFLOP/s")
    if hasattr(torch, "_grouped_mm"):
        x, w = random(32 * 1024, 7168), random(32, 2048, 7168)
        offsets = torch.arange(1, 33, device="cuda", dtype=torch.int32) * 1024
        flops = 2 * 32 * 1024 * 7168 * 2048
        ms = milliseconds(lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=offsets))
        report("grouped gemm bf16: 32 experts x 1024 forward", flops / ms / 1e9, "TFLOP/s")


def attention():
    attention_of(16, 192, 128)
    attention_of(20, 256, 256)


def attention_of(heads, dk, dv):
    length = 8192
    q, k = (random(1, heads, length, dk).requires_grad_() for _ in range(2))
    v = random(1, heads, length, dv).requires_grad_()
    flops = heads * length * length * (dk + dv)

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    report(f"attention forward: 8k, {dk}/{dv}, causal", flops / milliseconds(forward) / 1e9, "TFLOP/s")
    out, dout = forward(), random(1, heads, length, dv)
    ms = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    report(f"attention backward: 8k, {dk}/{dv}, causal", 2.5 * flops / ms / 1e9, "TFLOP/s")


def train():
    import transformers

    transformers.logging.set_verbosity_error()
    rows, length = 8, 1024
    config = transformers.DeepseekV3Config(**CONFIGS[args.config], max_position_embeddings=4096)
    best = 0
    for experts in ("grouped_mm", "eager"):
        try:
            config._experts_implementation = experts
            torch.manual_seed(0)
            model = transformers.DeepseekV3ForCausalLM(config).cuda()
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            ids = torch.randint(0, config.vocab_size, (rows, length), device="cuda")

            def step():
                optimizer.zero_grad()
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                return loss.item()

            seconds = []
            for i in range(13):
                torch.cuda.synchronize()
                started = time.perf_counter()
                step()
                torch.cuda.synchronize()
                if i >= 3:
                    seconds.append(time.perf_counter() - started)
            rate = rows * length / statistics.median(seconds)
            print(f"  {experts}: {rate:.0f} tokens/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
            best = max(best, rate)
            del model, optimizer
            torch.cuda.empty_cache()
        except Exception as error:  # one way of running the experts is enough for a comparison
            print(f"  {experts} failed: {error}", file=sys.stderr)
    if best:
        report(f"train: {args.config}, {rows} x {length}", best, "tokens/s")


versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
for part in args.only.split(","):
    try:
        {"peak": peak, "gemm": gemm, "attention": attention, "train": train}[part]()
    except Exception as error:  # the other figures are worth having
        print(f"{part} failed: {error}", file=sys.stderr)
    if args.json:  # whoever stops it keeps what was measured
        with open(args.json, "w") as file:
            json.dump({"card": torch.cuda.get_device_name(), "versions": versions, "results": results}, file, indent=2)
