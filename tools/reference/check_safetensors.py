"""Opens a safetensors file, or a folder with an index, and prints what Python's safetensors and torch read as one JSON.

    .venv-reference/bin/python tools/reference/check_safetensors.py PATH

{"metadata": {...}, "tensors": {name: {"dtype", "shape", "bytes": hexadecimal, "sum"}}}; exit status 1 when a file is refused.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open


def read(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}


def main(path):
    if path.is_dir():
        index = json.loads((path / "model.safetensors.index.json").read_text())
        tensors, metadata = {}, index.get("metadata")
        for shard in sorted(set(index["weight_map"].values())):
            _, part = read(path / shard)
            misplaced = [name for name in part if index["weight_map"].get(name) != shard]
            if misplaced:
                raise SystemExit(f"{shard} holds {misplaced}, which the index puts elsewhere")
            tensors |= part
        missing = set(index["weight_map"]) - set(tensors)
        if missing:
            raise SystemExit(f"the index names {sorted(missing)}, which no shard holds")
    else:
        metadata, tensors = read(path)
    json.dump({
        "metadata": metadata,
        "tensors": {
            name: {
                "dtype": str(t.dtype).removeprefix("torch."),
                "shape": list(t.shape),
                "bytes": t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex() if t.numel() else "",
                "sum": t.double().sum().item(),
            }
            for name, t in tensors.items()
        },
    }, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
