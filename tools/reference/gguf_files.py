"""A file written by llama.cpp's Python package `gguf`, for the reader and the quantizers of @moe/checkpoint.

    .venv-reference/bin/python tools/reference/gguf_files.py

writes packages/checkpoint/fixtures/:
    python.gguf    metadata of every type; f32 [40, 64] `values` (normal numbers, and blocks that are zero, tiny, with ties between
                   plus and minus, halves, one outlier), and the same encoded by the package as f16, bf16, q8_0, q4_0
    python.gguf.json    seed and versions
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, quants

SEED = 11
OUT = Path(__file__).resolve().parents[2] / "packages/checkpoint/fixtures"


def values():
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal((40, 64)).astype(np.float32)
    x[1] = 0
    x[2] *= 1e-6
    x[3] *= 1e4
    x[4, :32] = np.arange(32) - 15.5  # halves under a scale of 1/127
    x[5, ::2], x[5, 1::2] = 2, -2  # largest magnitude twice, with both signs
    x[6, :32] = np.linspace(-8, 7, 32)  # on and between the 16 levels
    x[7, 3] = 1000
    x[8, :32] = np.arange(32) * 0.5 - 8  # halves under a scale of 1
    x[9, 0], x[9, 1:32] = 127, np.arange(31) - 15.5  # halves under a scale of 1, 8 bits
    return x


def main():
    x = values()
    writer = GGUFWriter(OUT / "python.gguf", "llama")
    scalars = {
        "u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31), "f32": 0.1, "u64": 2**64 - 1,
        "i64": -(2**63), "f64": 0.1,
    }  # fmt: skip
    types = {
        "u8": "UINT8", "i8": "INT8", "u16": "UINT16", "i16": "INT16", "u32": "UINT32", "i32": "INT32", "f32": "FLOAT32",
        "u64": "UINT64", "i64": "INT64", "f64": "FLOAT64",
    }  # fmt: skip
    for name, value in scalars.items():
        writer.add_key_value(f"test.{name}", value, GGUFValueType[types[name]])
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "größe π 🐳")
    writer.add_array("test.strings", ["a", "", "Ġb"])
    writer.add_array("test.numbers", [1, -2, 3])
    writer.add_array("test.floats", [0.5, -0.25])
    writer.add_array("test.booleans", [True, False])
    writer.add_tensor("values", x)
    writer.add_tensor("f16", x.astype(np.float16))
    for name, kind in [("bf16", "BF16"), ("q8_0", "Q8_0"), ("q4_0", "Q4_0")]:
        encoded = quants.quantize(x, GGMLQuantizationType[kind])
        writer.add_tensor(name, encoded, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    record = {"command": "tools/reference/gguf_files.py", "seed": SEED, "gguf": version("gguf"), "numpy": np.__version__}
    (OUT / "python.gguf.json").write_text(json.dumps(record, indent=2) + "\n")


main()
