"""Peer of `pnpm bench decode`: greedy generate of DeepseekV3ForCausalLM in PyTorch at batch 1, random weights.

    .venv-reference/bin/python bench/peers/decode_transformers.py --config 200m --dtype f32 --tokens 32

Says a line of JSON when the model is ready, then for each line `run` on its input one with the milliseconds of each token after the first
and the processor time of one on average.
"""

import argparse
import json
import os
import resource
import sys
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--config", choices=["12m", "200m"], default="200m")
parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
parser.add_argument("--tokens", type=int, default=32)
parser.add_argument("--threads", type=int, default=os.cpu_count())
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)  # read when torch is imported

import torch
import transformers
from configs import CONFIGS
from transformers.generation.streamers import BaseStreamer

transformers.logging.set_verbosity_error()


class Clock(BaseStreamer):
    """Notes when each token arrives; the first call brings the prompt."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self.started = time.process_time()

    def end(self):
        pass


def main():
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    config = transformers.DeepseekV3Config(**CONFIGS[args.config], max_position_embeddings=512)
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    if args.dtype == "bf16":
        model = model.to(torch.bfloat16)
    prompt = torch.arange(7, 7 + 3 * 16, 3)[None]

    def run():
        clock = Clock()
        with torch.inference_mode():
            count = args.tokens + 1
            settings = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
            model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **settings)
        stamps = clock.times[1:]
        processor = 1000 * (time.process_time() - clock.started) / (len(stamps) - 1)
        return {"milliseconds": [1000 * (b - a) for a, b in zip(stamps, stamps[1:])], "processor": processor}

    run()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = f"pytorch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps({"device": device, "weightBytes": size, "residentBytes": resident}), flush=True)
    for line in sys.stdin:
        if line.strip() != "run":
            break
        print(json.dumps(run()), flush=True)


main()
