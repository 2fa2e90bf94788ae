"""Files written by Python's safetensors, for the reader of @moe/checkpoint.

    .venv-reference/bin/python tools/reference/safetensors_files.py

writes packages/checkpoint/fixtures/:
    dtypes.safetensors             one tensor per dtype, a scalar, an empty tensor, a unicode name, metadata
    sharded/                       model.safetensors.index.json and three shards
    fp8-blocks.safetensors         weight [192, 320] float8_e4m3fn with weight_scale_inv [2, 3], and the dequantized
                                   f32 weight as torch computes it
    half-values.safetensors        16-bit patterns (every exponent, both signs, NaN, infinities, subnormals) as bf16 and f16,
                                   with the f32 values; every byte as f8_e4m3 with its f32 value
    files.json                     seed, versions, expected values where JSON can hold them
"""

import json

import torch
from fixture_file import ROOT, deterministic, provenance, save_record
from safetensors.torch import save_file

SEED = 5
OUT = ROOT / "packages/checkpoint/fixtures"


def write_dtypes():
    values = torch.tensor([[0.0, -0.0, 1.0], [-2.5, 3.140625, 448.0]])
    tensors = {
        "f64": values.double(), "f32": values, "bf16": values.bfloat16(), "f16": values.half(),
        "f8_e4m3": values.to(torch.float8_e4m3fn), "i64": torch.tensor([-(2**53), -1, 0, 2**62]),
        "i32": torch.tensor([-(2**31), -1, 0, 2**31 - 1], dtype=torch.int32), "i16": torch.tensor([-5, 5], dtype=torch.int16),
        "i8": torch.tensor([-128, 127], dtype=torch.int8), "u8": torch.tensor([0, 255], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]), "scalar": torch.tensor(7.5), "empty": torch.zeros(0, 4),
        "größe.π": torch.tensor([1.0, 2.0]),
    }
    save_file(tensors, OUT / "dtypes.safetensors", metadata={"format": "pt", "note": "every dtype"})
    return {k: {"dtype": str(v.dtype).removeprefix("torch."), "shape": list(v.shape)} for k, v in tensors.items()}


def write_sharded(g):
    folder = OUT / "sharded"
    folder.mkdir(parents=True, exist_ok=True)
    shards = [
        {"model.embed_tokens.weight": torch.randn(6, 4, generator=g), "model.norm.weight": torch.ones(4)},
        {"model.layers.0.mlp.up_proj.weight": torch.randn(8, 4, generator=g).bfloat16()},
        {"lm_head.weight": torch.randn(6, 4, generator=g)},
    ]
    weight_map, total, sums = {}, 0, {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        for k, v in shard.items():
            weight_map[k], total = name, total + v.nbytes
            sums[k] = v.double().sum().item()
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return sums


def write_fp8_blocks(g):
    """The rule of weight_dequant in deepseek-ai/DeepSeek-V3 inference/kernel.py: w = q * scale_inv, 128 x 128 blocks."""
    weight = torch.randn(192, 320, generator=g) * torch.linspace(0.01, 3, 320)
    rows, columns = -(-192 // 128), -(-320 // 128)
    scale = torch.zeros(rows, columns)
    quantized = torch.zeros(192, 320, dtype=torch.float8_e4m3fn)
    dequantized = torch.zeros(192, 320)
    for r in range(rows):
        for c in range(columns):
            block = (slice(r * 128, (r + 1) * 128), slice(c * 128, (c + 1) * 128))
            scale[r, c] = weight[block].abs().max() / 448
            quantized[block] = (weight[block] / scale[r, c]).to(torch.float8_e4m3fn)
            dequantized[block] = quantized[block].float() * scale[r, c]
    # Rows round the block edges are enough to check; the whole f32 weight would be 245 kB.
    edges = torch.tensor([0, 1, 127, 128, 129, 191])
    save_file({
        "model.layers.0.mlp.up_proj.weight": quantized, "model.layers.0.mlp.up_proj.weight_scale_inv": scale,
        "model.norm.weight": torch.ones(4).bfloat16(), "expected.rows": edges.int(),
        "expected.dequantized": dequantized[edges].contiguous(),
    }, OUT / "fp8-blocks.safetensors", metadata={"format": "pt"})


def write_half_values():
    special = [0x7F80, 0xFF80, 0x7FC0, 0x7C00, 0xFC00, 0x7E00, 1, 0x8001]
    bits = torch.tensor([*range(0, 65536, 37), *special]).to(torch.uint16)
    bytes_ = torch.arange(256).to(torch.uint8)
    bf16, f16, f8 = bits.view(torch.bfloat16), bits.clone().view(torch.float16), bytes_.view(torch.float8_e4m3fn)
    save_file({"bf16": bf16, "bf16.f32": bf16.float(), "f16": f16, "f16.f32": f16.float(), "f8_e4m3": f8, "f8_e4m3.f32": f8.float()},
              OUT / "half-values.safetensors")


if __name__ == "__main__":
    deterministic(SEED)
    g = torch.Generator().manual_seed(SEED)
    OUT.mkdir(parents=True, exist_ok=True)
    dtypes = write_dtypes()
    sums = write_sharded(g)
    write_fp8_blocks(g)
    write_half_values()
    save_record(OUT / "files.json", {**provenance(SEED), "dtypes": dtypes, "shardedSums": sums})
    for path in sorted(OUT.rglob("*.safetensors")):
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")
