"""Peer of `pnpm bench gemm`: matrix products in PyTorch (oneDNN / MKL), square and at the shapes of experts.

    .venv-reference/bin/python bench/peers/gemm_torch.py --json

Square: C[n, n] = A[n, n] * B[n, n]^T. Grouped: E experts, `rows` rows each, weight [E, out, in], as a loop of linear calls
and, where it runs on CPU, as one torch._grouped_mm; its two gradients the same way. Output is in the dtype of the inputs, as PyTorch has it. With --json
the last line is one JSON object; seconds are medians.
"""

import argparse
import json
import os
import platform
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each shape")
parser.add_argument("--json", action="store_true")
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)

import torch
from torch.nn import functional as F

SQUARE = [256, 512, 1024, 2048]
# experts, rows each, in, out: gate+up and down of the configurations 12m and 200m at 2,048 tokens
GROUPED = [(16, 512, 256, 256), (16, 512, 128, 256), (64, 192, 512, 512), (64, 192, 256, 512), (256, 32, 256, 256)]


def median_seconds(fn):
    fn()
    times, end = [], time.perf_counter() + args.seconds
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        fn()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(kind, dtype, flops, fn, **shape):
    try:
        seconds = median_seconds(fn)
    except (RuntimeError, NotImplementedError) as error:
        return {"kind": kind, "dtype": dtype, **shape, "error": str(error).splitlines()[0]}
    return {"kind": kind, "dtype": dtype, **shape, "seconds": seconds, "gflops": flops / seconds / 1e9}


def main():
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    results = []
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        for n in SQUARE:
            a, b, c = (torch.randn(n, n).to(dtype) for _ in range(3))
            results.append(measure("square", name, 2 * n**3, lambda: torch.mm(a, b.t(), out=c), m=n, n=n, k=n))
        for experts, rows, k, n in GROUPED:
            x, w = torch.randn(experts * rows, k).to(dtype), torch.randn(experts, n, k).to(dtype)
            ends = torch.arange(1, experts + 1, dtype=torch.int32) * rows
            shape = dict(experts=experts, rows=rows, k=k, n=n)
            flops = 2 * experts * rows * k * n
            loop = lambda: [F.linear(part, one) for part, one in zip(x.split(rows), w)]
            results.append(measure("grouped-loop", name, flops, loop, **shape))
            grouped = lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends)
            results.append(measure("grouped-mm", name, flops, grouped, **shape))
            dy = torch.randn(experts * rows, n).to(dtype)
            results.append(measure("grouped-dx", name, flops, lambda: torch._grouped_mm(dy, w, offs=ends), **shape))
            results.append(measure("grouped-dw", name, flops, lambda: torch._grouped_mm(dy.t(), x, offs=ends), **shape))
    document = {"backend": "pytorch", "threads": args.threads, "results": results,
                "versions": {"torch": torch.__version__, "python": platform.python_version()}}
    if args.json:
        print(json.dumps(document))
        return
    for r in results:
        shape = f"{r['m']}" if r["kind"] == "square" else f"{r['experts']} x [{r['rows']}, {r['k']}] x [{r['k']}, {r['n']}]"
        print(f"{r['dtype']:5} {r['kind']:13} {shape:34} {r.get('error') or format(r['gflops'], '.0f') + ' GFLOP/s'}")


main()
