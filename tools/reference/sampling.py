"""What transformers' generate() leaves of a distribution, and a text with a repetition penalty.

    .venv-reference/bin/python tools/reference/sampling.py

writes packages/deepseek/fixtures/sampling.json, of the model in fixtures/v3-mtp: the logits [V] behind `prompt`; for each of `cases` its options, by
our names, and the probabilities [V] that are drawn from; and greedy texts under penalties, in which no token is nearer to the next likely one than `margin`.
"""

import torch
from fixture_file import ROOT, deterministic, provenance, save_record
from transformers import DeepseekV3ForCausalLM

FIXTURES = ROOT / "packages/deepseek/fixtures"
SEED = 5
LENGTH = 40
NAMES = {"temperature": "temperature", "topK": "top_k", "topP": "top_p", "minP": "min_p", "repetitionPenalty": "repetition_penalty"}
CASES = [
    dict(temperature=1.0),
    dict(temperature=3.0),
    dict(temperature=1.0, topK=1),
    dict(temperature=0.6, topK=7),
    dict(temperature=1.0, topK=1000),
    dict(temperature=3.0, topP=0.8),
    dict(temperature=3.0, minP=0.2),
    # A share of what topK leaves, and not of all.
    dict(temperature=3.0, topK=10, topP=0.5),
    dict(temperature=3.0, topK=12, topP=0.95, minP=0.3),
    dict(temperature=1.5, topK=20, topP=0.6, minP=0.1),
    dict(temperature=1.0, repetitionPenalty=1.3),
    dict(temperature=1.0, repetitionPenalty=0.7),
    # The penalty comes first: it decides what is likely.
    dict(temperature=2.0, topK=9, topP=0.9, minP=0.05, repetitionPenalty=2.0),
]


def generate(model, prompt, length, options):
    # What is not named is off: generate() has topK 50 of its own.
    named = dict(top_k=0) | {NAMES[name]: value for name, value in options.items()}
    return model.generate(
        torch.tensor([prompt]), max_new_tokens=length, do_sample="temperature" in options, eos_token_id=None, pad_token_id=0,
        output_scores=True, output_logits=True, return_dict_in_generate=True, **named,
    )


def main():
    deterministic(SEED)
    model = DeepseekV3ForCausalLM.from_pretrained(FIXTURES / "v3-mtp", dtype=torch.float32).eval()
    prompt = torch.randint(2, model.config.vocab_size, (12,)).tolist()
    cases = []
    for options in CASES:
        out = generate(model, prompt, 1, options)
        cases.append(dict(options=options, probabilities=out.scores[0][0].softmax(-1).tolist()))
    texts, margin = [], float("inf")
    for penalty in (1.05, 1.2, 0.9):
        out = generate(model, prompt, LENGTH, dict(repetitionPenalty=penalty))
        best = torch.cat(out.scores).topk(2, -1).values
        margin = min(margin, (best[:, 0] - best[:, 1]).min().item())
        texts.append(dict(repetitionPenalty=penalty, made=out.sequences[0, len(prompt):].tolist()))
    if margin < 1e-3:
        raise SystemExit(f"the two likeliest tokens are {margin} apart: take another seed")
    logits = out.logits[0][0].tolist()
    save_record(FIXTURES / "sampling.json", dict(
        about="generate() of transformers: what is drawn from, and greedy texts under a penalty", **provenance(SEED),
        model="v3-mtp", prompt=prompt, logits=logits, cases=cases, margin=margin, texts=texts,
    ))
    print(f"sampling: {len(cases)} distributions, {len(texts)} texts of {LENGTH}, margin {margin:.1e}")


if __name__ == "__main__":
    main()
