#!/bin/sh
# Tests and benchmarks this build on a GPU: tests, Hopper's kernels, comparisons with cuBLASLt and PyTorch if they are installed, compute-sanitizer.
# Only needs Linux and an NVIDIA driver. Options: ./run.sh --help; what to run first: docs/contributing/first-run-on-a-card.md.
set -eu
cd "$(dirname "$0")"
# Unpack again if an archive is newer than the unpacked files.
if [ ! -x pack/node ] || [ pack.tar.gz -nt pack/node ] || [ node.gz -nt pack/node ]; then
  rm -rf pack pack.new
  mkdir pack.new
  tar xzmf pack.tar.gz -C pack.new
  gunzip -c node.gz > pack.new/node
  chmod +x pack.new/node
  mv pack.new pack
fi
exec ./pack/node --no-warnings pack/tools/gpu/run.mjs "$@"
