/**
 * Matrix products on the CPU, compared with PyTorch.
 *
 *     pnpm bench gemm [--rounds N] [--seconds N] [--threads N] [--json FILE] [--no-peers]
 *
 * Measures GFLOP/s of square products and of one product per expert; PyTorch requires `.venv-reference`. Each round
 * runs one process of ours, then one of PyTorch's. Each reports the median time per shape, and the table shows the
 * medians of those. PyTorch's bf16 operands are bf16 in memory. Ours are f32 in memory and are rounded during the
 * product, except expert weights, of which AdamW keeps a bf16 copy: they are measured after an AdamW step.
 */
import { cpus } from 'node:os'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import type { OpAttrs, OpName, Precision, Shape, Value } from '@moe/core'
import { createBackend } from '@moe/kernels-cpu'
import { findPython, lastJson, median, printTable, root, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    rounds: { type: 'string', default: '3' },
    seconds: { type: 'string', default: '0.3' },
    threads: { type: 'string', default: String(cpus().length) },
    json: { type: 'string' },
    peers: { type: 'boolean', default: true },
    worker: { type: 'boolean', default: false },
  },
  allowNegative: true,
})

const kinds = ['square', 'grouped-mm', 'grouped-dx', 'grouped-dw'] as const
type Kind = (typeof kinds)[number]

/** One process's result for one shape. Square: m = n = k. Grouped: `experts` products of [rows, k] by [k, n], or a gradient of them. */
interface Measurement {
  readonly kind: Kind
  readonly dtype: Precision
  readonly experts?: number
  readonly rows?: number
  readonly m?: number
  readonly n: number
  readonly k: number
  readonly gflops: number
}

// The shapes of bench/peers/gemm_torch.py.
const square = [256, 512, 1024, 2048]
const grouped = [
  [16, 512, 256, 256],
  [16, 512, 128, 256],
  [64, 192, 512, 512],
  [64, 192, 256, 512],
  [256, 32, 256, 256],
]

// --- worker process: measures ---

async function work(): Promise<Measurement[]> {
  const backend = await createBackend({ threads: Number(options.threads) })

  const random = (shape: Shape): Value => {
    const data = Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => Math.random() * 2 - 1)
    return { handle: backend.upload(data, shape, 'f32'), shape, dtype: 'f32' }
  }

  function gflops<O extends OpName>(op: O, flops: number, inputs: Value[], attrs: OpAttrs[O], shape: Shape): number {
    const table = { ...backend.primitives, ...backend.fused } as Record<string, unknown>
    const kernel = table[op] as (inputs: Value[], attrs: unknown, outputs: unknown[]) => unknown[]
    const once = () => {
      for (const handle of kernel(inputs, attrs, [{ shape, dtype: 'f32' }])) backend.free(handle)
    }
    once()
    const seconds: number[] = []
    const end = performance.now() + 1000 * Number(options.seconds)
    while (seconds.length < 3 || performance.now() < end) {
      const started = performance.now()
      once()
      seconds.push((performance.now() - started) / 1000)
    }
    return flops / median(seconds) / 1e9
  }

  /** Weights after an optimizer step. */
  function stepped(weight: Value, use: () => unknown): Value {
    use()
    const moments = [0, 1, 2].map(() => random(weight.shape))
    const scale: Value = { handle: backend.upload(Float32Array.of(1), [], 'f32'), shape: [], dtype: 'f32' }
    const attrs = { lr: 0, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0, step: 1 }
    const [next, m, v] = backend.fused.adamwStep?.([weight, ...moments, scale], attrs, [weight, weight, weight]) ?? []
    for (const handle of [weight, ...moments, scale].map(({ handle }) => handle)) backend.free(handle)
    for (const handle of [m, v]) backend.free(handle)
    return { ...weight, handle: next }
  }

  const results: Measurement[] = []
  const precisions: Precision[] = backend.bf16Matmul ? ['f32', 'bf16'] : ['f32']
  for (const precision of precisions) {
    for (const n of square) {
      const inputs = [random([n, n]), random([n, n])]
      const attrs = { transposeA: false, transposeB: true, precision }
      const speed = gflops('matmul', 2 * n ** 3, inputs, attrs, [n, n])
      results.push({ kind: 'square', dtype: precision, m: n, n, k: n, gflops: speed })
      for (const { handle } of inputs) backend.free(handle)
    }
    for (const [experts, rows, k, n] of grouped) {
      const ends = Int32Array.from({ length: experts + 1 }, (_, e) => e * rows)
      const all = experts * rows
      const offsets: Value = {
        handle: backend.upload(ends, [experts + 1], 'i32'),
        shape: [experts + 1],
        dtype: 'i32',
      }
      const [x, dy] = [random([all, k]), random([all, n])]
      const first = random([experts, n, k])
      const weight = stepped(first, () =>
        gflops('groupedMatmul', 1, [x, first, offsets], { transposeW: true, precision }, [all, n]),
      )
      const flops = 2 * all * k * n
      const speed: Record<Exclude<Kind, 'square'>, () => number> = {
        'grouped-mm': () =>
          gflops('groupedMatmul', flops, [x, weight, offsets], { transposeW: true, precision }, [all, n]),
        'grouped-dx': () =>
          gflops('groupedMatmul', flops, [dy, weight, offsets], { transposeW: false, precision }, [all, k]),
        'grouped-dw': () => gflops('groupedMatmulWeightGrad', flops, [x, dy, offsets], { precision }, [experts, n, k]),
      }
      for (const [kind, measure] of Object.entries(speed)) {
        results.push({ kind: kind as Kind, dtype: precision, experts, rows, k, n, gflops: measure() })
      }
      for (const { handle } of [x, weight, dy, offsets]) backend.free(handle)
    }
  }
  console.error(backend.device)
  backend.dispose()
  return results
}

// --- main process: starts workers and compares ---

interface Report {
  readonly results: readonly Measurement[]
}

const keyOf = (r: Measurement) => [r.dtype, r.kind, r.experts ?? 1, r.rows ?? r.m, r.k, r.n].join(' ')

function compare() {
  const settings = ['--seconds', options.seconds, '--threads', options.threads]
  const self = fileURLToPath(import.meta.url)
  const python = findPython(options.peers)
  const ours = new Map<string, { shape: Measurement; speeds: number[] }>()
  const theirs = new Map<string, number[]>()
  for (let round = 0; round < Number(options.rounds); round++) {
    for (const shape of lastJson<Report>('@moe', process.execPath, [self, '--worker', ...settings]).results) {
      const entry = ours.get(keyOf(shape)) ?? { shape, speeds: [] }
      entry.speeds.push(shape.gflops)
      ours.set(keyOf(shape), entry)
    }
    if (!python) continue
    const { results } = lastJson<Report>('PyTorch', python, [`${root}bench/peers/gemm_torch.py`, '--json', ...settings])
    // Kinds that PyTorch does not support on the CPU have no speed.
    for (const shape of results.filter(({ gflops }) => gflops !== undefined)) {
      theirs.set(keyOf(shape), [...(theirs.get(keyOf(shape)) ?? []), shape.gflops])
    }
  }
  return [...ours].map(([key, { shape, speeds }]) => {
    const other = theirs.get(key)
    const gflops = median(speeds)
    const torch = other && median(other)
    return { ...shape, gflops, torchGflops: torch, ratio: torch && gflops / torch, rounds: speeds, torchRounds: other }
  })
}

if (options.worker) {
  process.stdout.write(`${JSON.stringify({ results: await work() })}\n`)
} else {
  const results = compare()
  const heads = ['dtype', 'what', 'shape', 'GFLOP/s', 'PyTorch', 'ratio']
  const rows = results.map(r => [
    r.dtype,
    r.kind,
    r.experts === undefined ? `${r.m} x ${r.k} x ${r.n}` : `${r.experts} x [${r.rows}, ${r.k}] [${r.k}, ${r.n}]`,
    r.gflops.toFixed(0),
    r.torchGflops?.toFixed(0) ?? '',
    r.ratio === undefined ? '' : `${r.ratio.toFixed(2)}x`,
  ])
  printTable(heads, rows, 3)
  writeResults(options.json, { threads: Number(options.threads), results })
}
