"""A linear layer in fp8 as DeepSeek-V3 is trained (report 3.3), by torch's float8_e4m3fn, for @moe/core.

    .venv-reference/bin/python tools/reference/fp8_linear.py

writes packages/core/fixtures/fp8.safetensors and fp8.json. Each of the three products rounds its operands along the axis that it
sums over, in tiles of 128 with the least power of two that fits as their scale (V3.1's ue8m0); products are exact. Tensors are named as in ops.safetensors.
"""

import torch
from fixture_file import ROOT, deterministic, provenance, save_record, save_tensors
from torch.nn import functional as F

SEED = 8
OUT = ROOT / "packages/core/fixtures"


def rounded(x):
    """Along the last axis."""
    size = x.shape[-1]
    tiles = F.pad(x, (0, -size % 128)).unflatten(-1, (-1, 128))
    scale = (tiles.abs().amax(-1, keepdim=True).double() / 448).log2().ceil().exp2().float()
    return ((tiles / scale).to(torch.float8_e4m3fn).double() * scale).flatten(-2)[..., :size]


def case(name, rows, inputs, outputs):
    """x [rows, inputs], weight [outputs, inputs], numbers of four orders of magnitude."""
    x, weight, dy = (
        torch.randn(*shape, generator=g) * 10.0 ** (4 * torch.rand(*shape, generator=g) - 2)
        for shape in ((rows, inputs), (outputs, inputs), (rows, outputs))
    )
    found = {
        "x": x,
        "weight": weight,
        "output": rounded(x) @ rounded(weight).T,
        "grad_output": dy,
        "grad.x": rounded(dy) @ rounded(weight.T).T,
        "grad.weight": rounded(dy.T) @ rounded(x.T).T,
    }
    tensors.update({f"{name}.{key}": value.float() for key, value in found.items()})


if __name__ == "__main__":
    deterministic(SEED)
    g = torch.Generator().manual_seed(SEED)
    tensors = {}
    case("long", rows=6, inputs=300, outputs=5)
    case("many", rows=270, inputs=4, outputs=3)
    case("wide", rows=3, inputs=5, outputs=200)
    size = save_tensors(OUT / "fp8.safetensors", tensors)
    save_record(OUT / "fp8.json", provenance(SEED))
    print(f"{len(tensors)} tensors, {size} bytes")
