"""The gates of the *released* DeepSeek models in a few lines, from deepseek-ai/DeepSeek-V3 inference/model.py (class Gate).

Some versions of transformers mask the experts of dropped groups with 0.0 instead of -inf, which selects masked experts
as soon as biases are negative (deepseek-ai/DeepSeek-V3#741, huggingface/transformers#45440). Fixtures follow this file;
the scripts that use transformers compare every routing decision with it and refuse to write when they differ.

Shapes: T tokens, E experts, G groups, K chosen experts.
"""

import torch


def v3_choice(logits_TE, bias_E, groups, kept_groups):
    """Choice scores with the experts of dropped groups at -inf, and the group scores (sum of the two best of a group)."""
    choice_TE = logits_TE.sigmoid() + bias_E
    group_TG = choice_TE.unflatten(-1, (groups, -1)).topk(2, dim=-1).values.sum(-1)
    kept_TM = group_TG.topk(kept_groups, dim=-1).indices
    mask_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, kept_TM, False)
    mask_TE = mask_TG.repeat_interleave(logits_TE.shape[-1] // groups, dim=-1)
    return choice_TE.masked_fill(mask_TE, float("-inf")), group_TG


def v3_gate(logits_TE, bias_E, *, groups, kept_groups, top_k, norm_topk_prob=True, scale=1.0):
    """Ids in ascending order [T, K] and their weights [T, K]: unbiased scores, normalized, scaled."""
    choice_TE, _ = v3_choice(logits_TE, bias_E, groups, kept_groups)
    ids_TK = choice_TE.topk(top_k, dim=-1).indices.sort(dim=-1).values
    weights_TK = logits_TE.sigmoid().gather(1, ids_TK)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, weights_TK * scale


def v2_choice(logits_TE, groups, kept_groups):
    """V2: softmax scores, group score = best expert, dropped groups masked with 0 (scores are positive, so 0 is below all)."""
    scores_TE = logits_TE.softmax(-1)
    group_TG = scores_TE.unflatten(-1, (groups, -1)).amax(-1)
    kept_TM = group_TG.topk(kept_groups, dim=-1).indices
    mask_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, kept_TM, False)
    mask_TE = mask_TG.repeat_interleave(logits_TE.shape[-1] // groups, dim=-1)
    return scores_TE.masked_fill(mask_TE, 0.0), group_TG


def v2_gate(logits_TE, *, groups, kept_groups, top_k, norm_topk_prob=False, scale=1.0):
    choice_TE, _ = v2_choice(logits_TE, groups, kept_groups)
    ids_TK = choice_TE.topk(top_k, dim=-1).indices.sort(dim=-1).values
    weights_TK = logits_TE.softmax(-1).gather(1, ids_TK)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
    return ids_TK, weights_TK * scale


def margin(choice_TE, group_TG, kept_groups, top_k):
    """Smallest gap between a chosen and a not chosen expert or group: rounding below it cannot change the routing."""
    best = choice_TE.topk(min(top_k + 1, choice_TE.shape[-1]), dim=-1).values
    gaps = []
    if best.shape[-1] > top_k:
        gap = best[:, top_k - 1] - best[:, top_k]
        gaps.append(gap[torch.isfinite(gap)])
    if kept_groups < group_TG.shape[-1]:
        order = group_TG.topk(kept_groups + 1, dim=-1).values
        gaps.append(order[:, kept_groups - 1] - order[:, kept_groups])
    gaps = torch.cat(gaps) if gaps else torch.empty(0)
    return gaps.min().item() if gaps.numel() else float("inf")


def sequence_balance_loss(logits_BTE, ids_BTK, alpha):
    """Sequence-wise balance loss of the V3 report, equations 17 to 20, mean over the sequences of the batch.

    f counts the experts *chosen by unbiased score* in the paper (equation 18: top-K of s); the caller passes those ids.
    """
    experts, top_k, tokens = logits_BTE.shape[-1], ids_BTK.shape[-1], logits_BTE.shape[1]
    scores_BTE = logits_BTE.sigmoid()
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
    chosen_BTE = torch.zeros_like(scores_BTE).scatter(-1, ids_BTK, 1.0)
    f_BE = chosen_BTE.sum(1) * experts / (top_k * tokens)
    p_BE = share_BTE.mean(1)
    return alpha * (f_BE * p_BE).sum(-1).mean()
