/** Benchmarks attention for one layer of several models: `node src/kernels/attention/attention.bench.ts [f32|bf16] [threads]`. */
import { type AttentionAttrs, Random, type Shape, sizeOf, type Value, type WidePrecision } from '@moe/core'
import { createBackend } from '../../backend.ts'

const shapes = [
  { name: '12m', B: 8, T: 256, S: 256, H: 8, Dk: 48, Dv: 32 },
  { name: 'MLA 192/128', B: 1, T: 1024, S: 1024, H: 8, Dk: 192, Dv: 128 },
  { name: '256/256', B: 1, T: 1024, S: 1024, H: 8, Dk: 256, Dv: 256 },
  { name: '64/64', B: 1, T: 1024, S: 1024, H: 16, Dk: 64, Dv: 64 },
  { name: 'decode 192/128', B: 1, T: 1, S: 4096, H: 16, Dk: 192, Dv: 128 },
]
const precision = (process.argv[2] ?? 'f32') as WidePrecision
const threads = process.argv[3] ? Number(process.argv[3]) : undefined
const backend = await createBackend(threads ? { threads } : {})
const random = new Random(1)
const make = (shape: Shape): Value => {
  return { handle: backend.upload(random.normal(sizeOf(shape)), shape, 'f32'), shape, dtype: 'f32' }
}
const spec = (shape: Shape) => ({ shape, dtype: 'f32' as const })

function best(run: () => void): number {
  let least = Number.POSITIVE_INFINITY
  for (let i = 0; i < 30; i++) {
    const started = performance.now()
    run()
    least = Math.min(least, performance.now() - started)
  }
  return least
}

console.log(backend.device, precision)
for (const { name, B, T, S, H, Dk, Dv } of shapes) {
  const [q, k, v, dout] = [make([B, T, H, Dk]), make([B, S, H, Dk]), make([B, S, H, Dv]), make([B, T, H, Dv])]
  const attrs: AttentionAttrs = { causal: true, scale: Dk ** -0.5, precision }
  const outSpecs = [spec([B, T, H, Dv]), spec([B, H, T])]
  const forward = () => backend.fused.attention?.([q, k, v], attrs, outSpecs) as unknown[]
  const [out, lse] = forward().map((handle, i) => ({ handle, ...outSpecs[i] }))
  const backward = () => backend.fused.attentionBackward?.([q, k, v, out, lse, dout], attrs, [q, k, v]) as unknown[]
  const pairs = B * H * (T * (S - T) + (T * (T + 1)) / 2)
  const forwardMs = best(() => forward().forEach(backend.free))
  const backwardMs = T === 1 ? Number.NaN : best(() => backward().forEach(backend.free))
  const rate = (ms: number, width: number) =>
    `${ms.toFixed(3)} ms (${((pairs * 2 * width) / ms / 1e6).toFixed(0)} GFLOP/s)`
  console.log(name.padEnd(15), 'forward', rate(forwardMs, Dk + Dv), 'backward', rate(backwardMs, 3 * Dk + 2 * Dv))
  for (const value of [q, k, v, dout, out, lse]) backend.free(value.handle)
}
backend.dispose()
