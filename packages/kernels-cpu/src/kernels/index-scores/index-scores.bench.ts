/**
 * Benchmarks index scores of V3.2's sizes against the same ops one by one, in turns: `node
 * src/kernels/index-scores/index-scores.bench.ts [f32|bf16] [instruction set]`.
 */
import { fromHost, indexScores, noGrad, Random, scope, setDefaultBackend, type WidePrecision } from '@moe/core'
import { createBackend } from '../../backend.ts'
import type { Isa } from '../../load.ts'

const [heads, features] = [64, 128]
const precision = (process.argv[2] ?? 'f32') as WidePrecision
const isa = process.argv[3] as Isa | undefined
const backend = await createBackend(isa ? { isa } : {})
setDefaultBackend(backend)
console.log(backend.device, precision)
const random = new Random(1)
const given = (...shape: number[]) => fromHost(random.normal(shape.reduce((a, b) => a * b)), shape, 'f32')
const timed = (run: () => unknown) => {
  const started = performance.now()
  noGrad(() => scope(() => void run()))
  return performance.now() - started
}
for (const [queries, count] of [1, 64, 512].flatMap(queries => [4096, 16384].map(count => [queries, count]))) {
  const [q, weights, keys] = [given(1, queries, heads, features), given(1, queries, heads), given(1, count, features)]
  const rounds = Math.max(5, Math.min(50, 2e6 / (queries * count)))
  const best = { apart: Number.POSITIVE_INFINITY, fused: Number.POSITIVE_INFINITY }
  for (let i = 0; i < rounds; i++) {
    const apart = timed(() => {
      const flat = q.reshape([1, queries * heads, features])
      const products = flat.matmul(keys, { transposeB: true, precision }).maximum(0)
      weights.reshape([queries, 1, heads]).matmul(products.reshape([queries, heads, count]))
    })
    const fused = timed(() => indexScores(q, weights, keys, { precision }))
    best.apart = Math.min(best.apart, apart)
    best.fused = Math.min(best.fused, fused)
  }
  const rate = (2 * queries * heads * features * count) / best.fused / 1e6
  console.log(
    `${queries} x ${count}`.padEnd(12),
    `apart ${best.apart.toFixed(2)} ms, fused ${best.fused.toFixed(2)} ms (${rate.toFixed(0)} GFLOP/s)`,
  )
  for (const tensor of [q, weights, keys]) tensor.dispose()
}
backend.dispose()
