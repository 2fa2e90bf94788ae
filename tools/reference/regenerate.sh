#!/usr/bin/env bash
# Writes every fixture again. Run tools/reference/setup.sh first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
for script in core_ops fp8_linear mla router deepseek_llm deepseek_v2 deepseek_v3 relatives sampling grpo dpo gguf_files safetensors_files; do
  .venv-reference/bin/python -W ignore "tools/reference/$script.py"
done
