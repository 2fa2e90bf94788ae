"""Compares the selections of sparse attention in transformers with eq. 1 of the DeepSeek-V3.2 report."""

import torch


class SelectionCheck:
    """Watches the indexers of a model: keeps the last selection of each, and the smallest margin of all."""

    def __init__(self):
        self.margin, self.seen = float("inf"), {}

    def watch(self, model):
        for name, module in model.named_modules():
            if name.split(".")[-1] == "indexer":
                module.register_forward_hook(lambda m, args, out, key=name: self.check(key, m, args, out))

    def check(self, key, indexer, args, out):
        """Recomputes the scores from eq. 1 of the report, in f64 and without the class."""
        hidden, compressed, (cos, sin), mask = (args[0].double(), args[1].double(), tuple(t.double() for t in args[2]), args[3])
        heads, features, rope = indexer.n_heads, indexer.head_dim, indexer.qk_rope_head_dim
        weight = lambda name: getattr(indexer, name).weight.double()
        q = (compressed @ weight("wq_b").T).unflatten(-1, (heads, features))
        k = torch.nn.functional.layer_norm(hidden @ weight("wk").T, (features,), weight("k_norm"), indexer.k_norm.bias.double(), 1e-6)
        half, interleaved = rope // 2, "Glm" in type(indexer).__name__
        c, s = cos[..., :half], sin[..., :half]

        def turn(x, c, s):
            x = x.clone()
            a, b = (x[..., 0:rope:2], x[..., 1:rope:2]) if interleaved else (x[..., :half], x[..., half:rope])
            a, b = a * c - b * s, b * c + a * s
            return torch.cat([a, b, x[..., rope:]], -1)

        q, k = turn(q, c[:, :, None], s[:, :, None]), turn(k, c, s)
        w = hidden @ weight("weights_proj").T * heads**-0.5 * features**-0.5
        scores = torch.einsum("bth,bths->bts", w, torch.einsum("bthd,bsd->bths", q, k).relu())
        visible = mask.expand(scores.shape) if mask.dtype == torch.bool else (mask == 0).expand(scores.shape)
        ordered, positions = scores.masked_fill(~visible, float("-inf")).sort(-1, descending=True)
        count = out.shape[-1]
        if count < scores.shape[-1]:
            gap = (ordered[..., count - 1] - ordered[..., count])[ordered[..., count].isfinite()]
            self.margin = min([self.margin, *gap.flatten().tolist()])
        own = lambda t: torch.where(visible.gather(-1, t), t, -1).sort(-1).values
        chosen = own(out.long())
        if self.margin > 0 and not torch.equal(chosen, own(positions[..., :count])):
            raise SystemExit(f"{key}: this version of transformers departs from eq. 1 of the report; fixture not written")
        self.seen[key] = chosen.int()
