"""Peer of `pnpm bench train`: one training step of DeepseekV3ForCausalLM in PyTorch, on random tokens.

    .venv-reference/bin/python bench/peers/train_torch.py --config 12m --mode bf16 --experts grouped_mm --json

A step is forward, backward, clipping at norm 1 and fused AdamW, on --tokens tokens (batch = tokens / --seq). `bf16` is autocast.
With --json the last line of output is one JSON object; secondsPerStep is the median of the timed steps.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time

from configs import CONFIGS, TOKENS_PER_STEP

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--config", choices=["12m", "200m"], default="12m")
parser.add_argument("--mode", choices=["f32", "bf16"], default="f32")
parser.add_argument("--compile", action="store_true", help="torch.compile the model (minutes before the first step)")
parser.add_argument("--experts", choices=["eager", "grouped_mm"], default="grouped_mm")
parser.add_argument("--steps", type=int, default=5, help="timed steps, after the warm-up")
parser.add_argument("--warmup", type=int, default=2)
parser.add_argument("--seq", type=int, default=256)
parser.add_argument("--tokens", type=int, default=TOKENS_PER_STEP, help="tokens of a step")
parser.add_argument("--threads", type=int, default=os.cpu_count())
parser.add_argument("--json", action="store_true")
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when torch is imported

import torch
import transformers

transformers.logging.set_verbosity_error()


def main():
    if args.tokens % args.seq:
        parser.error(f"--seq {args.seq} does not divide {args.tokens} tokens")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    batch = args.tokens // args.seq
    config = transformers.DeepseekV3Config(**CONFIGS[args.config], max_position_embeddings=max(512, args.seq))
    config._experts_implementation = args.experts
    model = transformers.DeepseekV3ForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.randint(0, config.vocab_size, (batch, args.seq))
    forward = torch.compile(model) if args.compile else model

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.mode == "bf16"):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    started = time.perf_counter()
    first_loss = step()
    for _ in range(args.warmup - 1):
        step()
    warmup_seconds = time.perf_counter() - started
    seconds, loss = [], first_loss
    for _ in range(args.steps):
        started = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {
        "config": args.config, "backend": "pytorch", "mode": args.mode, "compile": args.compile,
        "experts": config._experts_implementation, "attention": config._attn_implementation, "seq": args.seq,
        "batch": batch, "threads": args.threads, "parameters": parameters, "tokensPerSecond": args.tokens / median,
        "secondsPerStep": median, "seconds": seconds, "warmupSeconds": warmup_seconds, "peakMemoryBytes": peak,
        "firstLoss": first_loss, "lastLoss": loss,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{args.config} {args.mode}{' compiled' if args.compile else ''} {args.experts}: "
              f"{result['tokensPerSecond']:.0f} tokens/s, {median:.3f} s/step, peak {peak / 2**20:.0f} MiB, "
              f"loss {first_loss:.4f} -> {loss:.4f}")


main()
