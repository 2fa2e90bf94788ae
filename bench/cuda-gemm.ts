/**
 * Dense matrix products on the GPU: our kernels compared with cuBLASLt.
 *
 *     pnpm bench cuda-gemm [--tokens N] [--repeats N] [--json FILE] [--tiny]
 *
 * Measures the products alone, with operands prepared in memory, at the sizes of DeepSeek-V3's linear layers: mma,
 * wgmma (on Hopper) and cuBLASLt. Times are device times (events), medians of runs that take turns. cuBLASLt is the
 * library that MOE_CUDA_CUBLASLT names, or the first that is found, with the first algorithm of its heuristic. Without
 * cuBLASLt, only our kernels are measured. wgmma requires k along memory; for operands in another layout, its time
 * includes the transposition. `--tiny` runs everything at small sizes, as a smoke test.
 */
import { writeFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { Random, type WidePrecision } from '@moe/core'
import { gemm } from '../packages/kernels-cuda/src/kernels/matmul/gemm.ts'
import type { Matrix, Product } from '../packages/kernels-cuda/src/matrix.ts'
import { type Opened, openCuda } from '../packages/kernels-cuda/src/open.ts'
import { linears } from './shared/linears.ts'

const { values: options } = parseArgs({
  options: {
    tokens: { type: 'string', default: '4096' },
    repeats: { type: 'string', default: '20' },
    json: { type: 'string' },
    tiny: { type: 'boolean', default: false },
  },
})
const small = options.tiny ? 64 : 1
const tokens = Number(options.tokens) / small
const repeats = options.tiny ? 2 : Number(options.repeats)
/** Number of products timed together, so that host time between them does not count. */
const inRow = options.tiny ? 1 : 5

const named = process.env['MOE_CUDA_CUBLASLT']
const path = named && !['0', '1', 'measured'].includes(named) ? named : true
const devices: Record<string, Opened> = { mma: await openCuda({ wgmma: false, cublasLt: false }) }
const hopper = await openCuda({ wgmma: true, cublasLt: false })
if (hopper.cuda.wgmma) devices['wgmma'] = hopper
const nvidia = await openCuda({ wgmma: false, cublasLt: path })
const { cublasLt } = nvidia.cuda
if (cublasLt !== undefined) devices['cuBLASLt'] = nvidia

const { device, memory, stream } = devices['mma']
const version = cublasLt === undefined ? 'no cuBLASLt found' : `cuBLASLt ${cublasLt.version}`
console.log(`${device.name}, sm_${device.capability}, ${version}`)
const ways = Object.entries(devices).map(([name, opened]) => ({ name, opened, multiply: gemm(opened.cuda) }))

interface Result {
  readonly name: string
  /** TFLOP/s of each implementation. */
  readonly rates: Record<string, number>
  /** The faster of our kernels relative to cuBLASLt. */
  readonly ofCublasLt?: number
  /** Largest difference from the results of the mma kernels, relative to the largest of the compared elements. */
  readonly distance: number
}
const results: Result[] = []

/** A matrix of repeated numbers from a small set; the values do not matter as long as they are not all zero. */
async function matrix(precision: WidePrecision, rows: number, columns: number, seed: number): Promise<Matrix> {
  const ld = precision === 'bf16' ? Math.ceil(columns / 8) * 8 : columns
  const values = new Random(seed).uniform(4096)
  const host =
    precision === 'bf16' ? Uint16Array.from(values, x => 0x3f00 + 0x80 * x) : Float32Array.from(values, x => 2 * x - 1)
  const buffer = memory.allocate(rows * ld * host.BYTES_PER_ELEMENT)
  for (let at = 0; at < buffer.bytes; at += host.byteLength) {
    const bytes = Math.min(host.byteLength, buffer.bytes - at)
    stream.upload(buffer.pointer + at, new Uint8Array(host.buffer, 0, bytes), 'bench')
  }
  buffers.push(buffer)
  return { pointer: buffer.pointer, ld }
}
const buffers: Array<ReturnType<typeof memory.allocate>> = []

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2
}

async function measure(name: string, precision: WidePrecision, product: Product): Promise<void> {
  const { m, n, k, transposeA, transposeB } = product
  const a = transposeA ? await matrix(precision, k, m, 1) : await matrix(precision, m, k, 1)
  const b = transposeB ? await matrix(precision, n, k, 2) : await matrix(precision, k, n, 2)
  const c = memory.allocate(m * n * 4)
  buffers.push(c)
  await stream.sync()
  const run = ({ opened, multiply }: (typeof ways)[number]) => {
    opened.memory.begin('bench')
    multiply(precision, c.pointer, a, b, product)
    opened.memory.end()
  }
  const taking = ways.filter(way => precision === 'bf16' || way.name !== 'wgmma')
  const times = new Map<string, number[]>(taking.map(way => [way.name, []]))
  let reference: Float32Array | undefined
  let distance = 0
  for (const way of taking) {
    for (let i = 0; i < 3; i++) run(way)
    const found = new Float32Array(Math.min(m * n, 2 ** 20))
    await way.opened.stream.download(c.pointer, found)
    reference ??= found
    const expected = reference
    const largest = expected.reduce((most, x) => Math.max(most, Math.abs(x)), 0)
    distance = found.reduce((most, x, i) => Math.max(most, Math.abs(x - expected[i]) / largest), distance)
  }
  for (let i = 0; i < repeats; i++) {
    for (const way of taking) {
      const milliseconds = await way.opened.stream.elapsed(() => {
        for (let j = 0; j < inRow; j++) run(way)
      })
      times.get(way.name)?.push(milliseconds / inRow)
    }
  }
  for (const buffer of buffers.splice(0)) memory.release(buffer)
  const rates = Object.fromEntries([...times].map(([way, list]) => [way, (2 * m * n * k) / median(list) / 1e9]))
  const best = Math.max(...Object.entries(rates).map(([way, rate]) => (way === 'cuBLASLt' ? 0 : rate)))
  const ofCublasLt = cublasLt === undefined ? undefined : best / rates['cuBLASLt']
  results.push({ name, rates, ofCublasLt, distance })
  const columns = Object.entries(rates).map(([way, rate]) => `${way} ${rate.toPrecision(4).padStart(6)}`)
  const ratio = ofCublasLt === undefined ? '' : `  ours ${ofCublasLt.toFixed(2)}x cuBLASLt`
  console.log(
    `${name.padEnd(28)} TFLOP/s: ${columns.join('  ')}${ratio}  (max difference ${distance.toExponential(0)})`,
  )
}

for (const [name, [full, wide]] of Object.entries(linears)) {
  const [k, n] = [full / small, wide / small]
  await measure(`bf16 ${name} forward`, 'bf16', { m: tokens, n, k, transposeA: false, transposeB: true })
  await measure(`bf16 ${name} dX`, 'bf16', { m: tokens, n: k, k: n, transposeA: false, transposeB: false })
  await measure(`bf16 ${name} dW`, 'bf16', { m: n, n: k, k: tokens, transposeA: true, transposeB: false })
}
const size = 4096 / small
await measure('f32 4096 square', 'f32', { m: size, n: size, k: size, transposeA: false, transposeB: true })

const forward = results.filter(({ name }) => name.endsWith('forward')).map(({ ofCublasLt }) => ofCublasLt ?? Number.NaN)
if (cublasLt !== undefined) {
  const [least, sum] = [Math.min(...forward), forward.reduce((a, b) => a + b, 0)]
  console.log(
    `forward, ours over cuBLASLt: ${least.toFixed(2)} at worst, ${(sum / forward.length).toFixed(2)} on average`,
  )
}
if (options.json !== undefined) {
  const { name, capability, multiprocessors, driverVersion } = device
  const machine = { name, capability, multiprocessors, driverVersion, cublasLt: cublasLt?.version, tokens }
  writeFileSync(options.json, `${JSON.stringify({ machine, date: new Date().toISOString(), results }, null, 2)}\n`)
}
