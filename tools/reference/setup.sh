#!/usr/bin/env bash
# Makes .venv-reference at the repository root: PyTorch (CPU) and transformers, for fixtures and side-by-side benches.
# Nothing that ships or tests by default needs it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
venv=$root/.venv-reference
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
# The CPU build is a tenth of the size of the CUDA one; where no index carries it under its local version, take what there is.
"${pip[@]}" install 'torch==2.13.0+cpu' 2>/dev/null || "${pip[@]}" install 'torch==2.13.0'
"${pip[@]}" install -r "$root/tools/reference/requirements.txt"
"$venv/bin/python" -c 'import torch, transformers; print(f"reference environment ready: torch {torch.__version__}, transformers {transformers.__version__}")'
