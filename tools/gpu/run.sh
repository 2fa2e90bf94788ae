#!/bin/sh
# Everything that a GPU can say about this build: tests, products and kernels of Hopper, cuBLASLt and PyTorch beside ours where there are any, benchmarks, compute-sanitizer.
# Needs Linux and an NVIDIA driver, nothing else. Its options: ./run.sh --help; what to run first: docs/contributing/first-run-on-a-card.md.
set -eu
cd "$(dirname "$0")"
# Unpacked files are newer than the pack that they are from.
if [ ! -x pack/node ] || [ pack.tar.gz -nt pack/node ] || [ node.gz -nt pack/node ]; then
  rm -rf pack pack.new
  mkdir pack.new
  tar xzmf pack.tar.gz -C pack.new
  gunzip -c node.gz > pack.new/node
  chmod +x pack.new/node
  mv pack.new pack
fi
exec ./pack/node --no-warnings pack/tools/gpu/run.mjs "$@"
