"""Quantized weights as compressed-tensors stores them, and their values, for the reader of @moe/checkpoint.

    .venv-reference/bin/python tools/reference/packed_weights.py FOLDER ...

Needs the package compressed-tensors (written with commit ac8e2ba8 of vllm-project/compressed-tensors), pydantic, loguru, frozendict and psutil in the given
folders, which are searched last: transformers changes its imports if it finds compressed-tensors itself.

writes packages/checkpoint/fixtures/packed-weights.safetensors and .json. Cases: group and channel (weight_packed, weight_scale in bf16, weight_shape: int4,
codes -8 to 7), fp8-tensor, fp8-channel and fp8-block (weight, weight_scale). <case>.expected is what compressed-tensors decompresses in f32 (scales are
converted first, so that products are not rounded to bf16).
"""

import sys

import torch
import transformers.modeling_utils  # noqa: F401
from fixture_file import ROOT, deterministic, provenance, save_record, save_tensors

sys.path += sys.argv[1:]
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor  # noqa: E402
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402

SEED = 6
OUT = ROOT / "packages/checkpoint/fixtures"
INT4 = dict(num_bits=4, type="int", symmetric=True)
FP8 = dict(num_bits=8, type="float", symmetric=True)
CASES = {
    "group": ((6, 96), dict(INT4, strategy="group", group_size=32), [6, 3]),
    "group-incomplete-words": ((4, 36), dict(INT4, strategy="group", group_size=12), [4, 3]),
    "channel": ((5, 40), dict(INT4, strategy="channel"), [5, 1]),
    "fp8-tensor": ((5, 12), dict(FP8, strategy="tensor"), [1]),
    "fp8-channel": ((5, 12), dict(FP8, strategy="channel"), [5, 1]),
    "fp8-block": ((6, 12), dict(FP8, strategy="block", block_structure=[4, 8]), [2, 2]),
}


def peaks(weight, args, shape):
    """The largest magnitude of each group of weights with a common scale."""
    if args["strategy"] == "tensor":
        return weight.abs().amax().reshape(1)
    if args["strategy"] == "block":
        rows, columns = args["block_structure"]
        blocks = [[weight[i * rows:(i + 1) * rows, j * columns:(j + 1) * columns].abs().amax() for j in range(shape[1])] for i in range(shape[0])]
        return torch.tensor(blocks)
    return weight.unflatten(1, (shape[1], -1)).abs().amax(-1)


def write():
    deterministic(SEED)
    generator = torch.Generator().manual_seed(SEED)
    tensors, configs = {}, {}
    for case, (size, args, shape) in CASES.items():
        weight = torch.randn(size, generator=generator)
        weight.view(-1)[::7] = -weight.abs().amax()  # rounds to the lowest code
        largest = 8.0 if args["type"] == "int" else 448.0
        scale = (peaks(weight, args, shape) / largest).bfloat16()
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        compressor = PackedQuantizationCompressor if args["type"] == "int" else FloatQuantizationCompressor
        stored = compressor.compress({"weight": weight, "weight_scale": scale.float()}, scheme)
        decompressed = compressor.decompress(dict(stored), scheme)["weight"]
        stored["weight_scale"] = scale
        tensors |= {f"{case}.{name}": t for name, t in stored.items()}
        tensors[f"{case}.expected"] = decompressed.float()
        configs[case] = scheme.weights.model_dump(mode="json")
    size = save_tensors(OUT / "packed-weights.safetensors", tensors)
    record = provenance(SEED)
    record["command"] = ".venv-reference/bin/python tools/reference/packed_weights.py FOLDER ..."
    save_record(OUT / "packed-weights.json", {**record, "weights": configs})
    print(size, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})


if __name__ == "__main__":
    write()
