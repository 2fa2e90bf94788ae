"""Direct preference optimization of a tiny bigram model, by torch's autograd on the loss as it is printed (Rafailov et al. 2023, eq. 7).

    .venv-reference/bin/python tools/reference/dpo.py

writes packages/trainer/fixtures/dpo.json: `embed` and `head` [V, D] of the policy and of the reference (logits of what follows token x: embed[x] head^T), `pairs` of a prompt, the chosen and the rejected tokens behind
it; for each of `cases` the implicit rewards and the loss of every pair, and the gradients of their mean. All in doubles.
"""

import torch
from fixture_file import ROOT, deterministic, provenance, save_record
from grpo import D, V, log_probs

SEED = 11
PAIRS = 5
BETAS = [0.1, 2.0]


def rewards(policy, reference, pairs, beta):
    """[pairs, 2]: the implicit rewards of the chosen and the rejected texts."""

    def log_prob(model, pair, side):
        return log_probs(*model, dict(prompt=pair["prompt"], tokens=pair[side])).sum()

    ratio = lambda pair, side: log_prob(policy, pair, side) - log_prob(reference, pair, side)
    return torch.stack([torch.stack([beta * ratio(pair, side) for side in ("chosen", "rejected")]) for pair in pairs])


def main():
    deterministic(SEED)
    g = torch.Generator().manual_seed(SEED)
    weights = lambda: tuple(torch.randn(V, D, generator=g).double() for _ in range(2))
    ids = lambda most: torch.randint(0, V, (int(torch.randint(1, most + 1, (1,), generator=g)),), generator=g).tolist()
    policy, reference = weights(), weights()
    pairs = [dict(prompt=ids(3), chosen=ids(6), rejected=ids(6)) for _ in range(PAIRS)]
    cases = []
    for beta in BETAS:
        embed, head = (w.clone().requires_grad_() for w in policy)
        chosen, rejected = rewards((embed, head), reference, pairs, beta).unbind(1)
        each = -torch.nn.functional.logsigmoid(chosen - rejected)
        each.mean().backward()
        sides = dict(chosen=chosen.tolist(), rejected=rejected.tolist())
        cases.append(dict(beta=beta, **sides, losses=each.tolist(), embed=embed.grad.tolist(), head=head.grad.tolist()))
    models = {name: dict(embed=e.tolist(), head=h.tolist()) for name, (e, h) in dict(policy=policy, reference=reference).items()}
    save_record(ROOT / "packages/trainer/fixtures/dpo.json", dict(provenance(SEED), **models, pairs=pairs, cases=cases))


if __name__ == "__main__":
    main()
