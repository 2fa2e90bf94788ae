#!/bin/sh
# Everything that a GPU can say about this build: the backend suite, the tests of the model parts, compute-sanitizer and the
# benchmarks, beside PyTorch's where there is one. On a Hopper suite and benchmarks run once more with its own products
# (MOE_CUDA_WGMMA=1), and where a cuBLASLt is found (or named: MOE_CUDA_CUBLASLT=PATH) once more with it, and its products beside ours.
# Needs Linux and an NVIDIA driver, nothing else. Writes one JSON file.
#
#   ./run.sh [--quick] [--only PART,PART] [--out FOLDER]
#
# Parts: suite, models, sanitizer, bench (with PyTorch's), and of a Hopper or with cuBLASLt suite-wgmma, suite-cublas-lt, bench-wgmma, bench-cublas-lt.
# --quick leaves sanitizer and benchmarks out. With --only, where time at the card is short, the results of other parts in FOLDER stay.
set -u
cd "$(dirname "$0")"
here=$(pwd)
out=$here/results
parts=suite,suite-wgmma,suite-cublas-lt,models
benches=sanitizer,bench,bench-wgmma,bench-cublas-lt
only=$parts,$benches
while [ $# -gt 0 ]; do
  case $1 in
    --quick) only=$parts ;;
    --only)
      shift
      only=${1-}
      for part in $(echo "$only" | tr , ' '); do
        case ,$parts,$benches, in *",$part,"*) ;; *) echo "run.sh: no part $part; there are $parts,$benches" >&2; exit 2 ;; esac
      done
      ;;
    --out) shift; out=$1 ;;
    --help) sed -n '2,10s/^# \{0,1\}//p' "$here/run.sh"; exit 0 ;;
    *) echo "run.sh: unknown option $1; see --help" >&2; exit 2 ;;
  esac
  shift
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
[ -x node ] || { gunzip -c node.gz > node.new && chmod +x node.new && mv node.new node; } || exit 1
export MOE_REQUIRE_CUDA=1 NO_COLOR=1
status=0

wants() { case ,$only, in *",$1,"*) return 0 ;; *) return 1 ;; esac; }

# tests PRELOADED NAME FILES...: runs test files, prints failures, leaves NAME.json
tests() {
  preloaded=$1
  name=$2
  shift 2
  echo "== $name"
  timeout 900 ./node --no-warnings --import ./tools/gpu/"$preloaded".mjs --test --test-concurrency=1 \
    --test-reporter=./tools/gpu/reporter.mjs --test-reporter-destination="$out/$name.json" \
    --test-reporter=dot --test-reporter-destination=stdout "$@" || status=1
  ./node tools/gpu/summary.mjs "$out/$name.json"
}

command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
hopper=0
[ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -1)" = 9.0 ] && hopper=1
# A cuBLASLt: named, found by the package, or beside some Python's PyTorch.
cublas_lt=
named=${MOE_CUDA_CUBLASLT:-}
unset MOE_CUDA_CUBLASLT
for candidate in ${named:-1 $(python3 -c 'import glob, sys
for folder in sys.path:
    print(*sorted(glob.glob(folder + "/nvidia/c*/lib/libcublasLt.so.1[23]"), reverse=True))' 2> /dev/null)}; do
  version=$(MOE_CUDA_CUBLASLT=$candidate ./node --no-warnings tools/gpu/cublas-lt.mjs) && [ -n "$version" ] || continue
  cublas_lt=$candidate
  echo "cuBLASLt $version ($candidate)"
  break
done
wants suite && tests suite suite $(find packages/kernels-cuda/src -name '*.test.ts')
[ $hopper = 1 ] && wants suite-wgmma && MOE_CUDA_WGMMA=1 tests suite suite-wgmma $(find packages/kernels-cuda/src -name '*.test.ts')
if [ -n "$cublas_lt" ] && wants suite-cublas-lt; then
  MOE_CUDA_CUBLASLT=$cublas_lt tests suite suite-cublas-lt $(find packages/kernels-cuda/src -name '*.test.ts')
fi
# Without those of files and commands, which need more than the pack has.
wants models && tests models models $(find packages/attention-mla/src packages/router/src packages/mtp/src packages/deepseek/src -name '*.test.ts' ! -path '*/gguf/*' ! -name 'cli.test.ts')

if wants sanitizer && command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    echo "== compute-sanitizer $tool"
    timeout 300 compute-sanitizer --tool $tool --error-exitcode 9 --log-file "$out/sanitizer-$tool.log" \
      ./node --no-warnings --import ./tools/gpu/suite.mjs packages/kernels-cuda/src/backend.test.ts > "$out/sanitizer-$tool.tests.log" 2>&1
    code=$?
    echo "$code" > "$out/sanitizer-$tool.code"
    [ $code = 0 ] || { status=1; tail -5 "$out/sanitizer-$tool.log"; }
  done
fi
if wants bench && python3 -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
  echo "== PyTorch"
  python3 bench/peers/cuda_torch.py --json "$out/peers.json" || rm -f "$out/peers.json"
fi
peers=
[ -f "$out/peers.json" ] && peers="--peers $out/peers.json"
if wants bench; then
  echo "== benchmarks"
  ./node --no-warnings --expose-gc bench/cuda.ts --json "$out/bench.json" $peers || status=1
  echo "== products alone"
  MOE_CUDA_CUBLASLT=$cublas_lt timeout 300 ./node --no-warnings bench/cuda-gemm.ts --json "$out/bench-gemm.json" || status=1
fi
if [ -n "$cublas_lt" ] && wants bench-cublas-lt; then
  echo "== benchmarks, products of cuBLASLt"
  MOE_CUDA_CUBLASLT=$cublas_lt timeout 600 ./node --no-warnings --expose-gc bench/cuda.ts --only gemm,train \
    --json "$out/bench-cublas-lt.json" $peers || status=1
fi
if [ $hopper = 1 ] && wants bench-wgmma; then
  echo "== benchmarks, products of Hopper"
  MOE_CUDA_WGMMA=1 timeout 600 ./node --no-warnings --expose-gc bench/cuda.ts --only gemm,attention,decode,train,generate \
    --json "$out/bench-wgmma.json" $peers || status=1
fi
./node tools/gpu/summary.mjs --merge "$out" > "$out/gpu.json" && echo "wrote $out/gpu.json"
exit $status
