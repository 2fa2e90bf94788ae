"""Writes one fixture: tensors as safetensors, provenance and scalars as JSON beside them."""

import json
import platform
import sys
from pathlib import Path

import numpy
import safetensors
import torch
import transformers
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 200_000


def versions():
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "numpy": numpy.__version__,
    }


def provenance(seed):
    """What a reader needs to make the same file again."""
    script = Path(sys.argv[0]).name
    return {
        "command": " ".join([".venv-reference/bin/python", f"tools/reference/{script}", *sys.argv[1:]]),
        "seed": seed,
        "versions": versions(),
    }


def save_tensors(path, tensors):
    """Contiguous copies, so that views of one storage (experts of a stack) are written apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, path, metadata={"format": "pt"})
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"{path}: {size} bytes, the limit for a fixture is {MAX_BYTES}; make the sizes smaller")
    return size


def save_record(path, record):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def deterministic(seed):
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
