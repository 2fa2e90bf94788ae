"""Group relative policy optimization of a tiny bigram model, by torch's autograd on the formulas as they are printed (DeepSeekMath, eq. 3 and 4).

    .venv-reference/bin/python tools/reference/grpo.py

writes packages/trainer/fixtures/grpo.json: `embed` and `head` [V, D] (logits of what follows token x: embed[x] head^T), `texts` in groups with the prompt, the tokens behind it,
the reward, and the log-probabilities `old` and `reference` of each token; for each of `cases` the advantages, the objective J, and the gradients of -J. All in doubles.
"""

import torch
from fixture_file import ROOT, deterministic, provenance, save_record

SEED = 5
V, D, GROUPS, SIZE = 12, 6, 3, 4
CASES = [
    dict(average="token", clip=[0.2, 0.2], klWeight=0.0),
    dict(average="text", clip=[0.2, 0.2], klWeight=0.0),
    dict(average="token", clip=[0.1, 0.4], klWeight=0.3),
    dict(average="text", clip=[0.2, 0.28], klWeight=0.04),
]


def log_probs(embed, head, text):
    ids = torch.tensor(text["prompt"] + text["tokens"])
    logits = embed[ids[:-1]] @ head.T
    all = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
    return all[len(text["prompt"]) - 1:]


def objective(embed, head, groups, case):
    """J of eq. 3, its inner average over all tokens of the step or over the tokens of each text."""
    below, above = case["clip"]
    per_text, advantages = [], []
    for group in groups:
        rewards = torch.tensor([text["reward"] for text in group], dtype=torch.float64)
        deviation = rewards.std(correction=0)
        a = (rewards - rewards.mean()) / deviation if deviation > 0 else torch.zeros_like(rewards)
        advantages += a.tolist()
        for text, advantage in zip(group, a):
            now = log_probs(embed, head, text)
            ratio = torch.exp(now - torch.tensor(text["old"], dtype=torch.float64))
            clipped = torch.clamp(ratio, 1 - below, 1 + above)
            x = torch.exp(torch.tensor(text["reference"], dtype=torch.float64)) / torch.exp(now)
            kl = x - torch.log(x) - 1
            per_text.append(torch.min(ratio * advantage, clipped * advantage) - case["klWeight"] * kl)
    if case["average"] == "token":
        return torch.cat(per_text).mean(), advantages
    return torch.stack([terms.mean() for terms in per_text]).mean(), advantages


def main():
    deterministic(SEED)
    g = torch.Generator().manual_seed(SEED)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    # f32 holds them, as weights are f32.
    embed, head = (normal(V, D).float().double() for _ in range(2))
    groups = []
    for number in range(GROUPS):
        prompt = torch.randint(0, V, (2 + number,), generator=g).tolist()
        group = []
        for i in range(SIZE):
            length = int(torch.randint(1, 7, (1,), generator=g))
            tokens = torch.randint(0, V, (length,), generator=g).tolist()
            text = dict(prompt=prompt, tokens=tokens, reward=0.5 if number == 1 else float(torch.rand(1, generator=g)))
            now = log_probs(embed, head, text)
            text["old"] = (now + 0.3 * normal(length)).tolist()
            text["reference"] = (now + 0.5 * normal(length)).tolist()
            group.append(text)
        groups.append(group)
    results = []
    for case in CASES:
        e, h = embed.clone().requires_grad_(), head.clone().requires_grad_()
        j, advantages = objective(e, h, groups, case)
        (-j).backward()
        results.append(dict(case, advantages=advantages, objective=j.item(), embed=e.grad.tolist(), head=h.grad.tolist()))
    record = dict(provenance(SEED), embed=embed.tolist(), head=head.tolist(), texts=sum(groups, []), groupSize=SIZE, cases=results)
    save_record(ROOT / "packages/trainer/fixtures/grpo.json", record)


if __name__ == "__main__":
    main()
