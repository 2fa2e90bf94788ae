/**
 * The GPU backend's heuristic choices compared with their alternatives.
 *
 *     pnpm bench cuda-sweep [--only products,experts,entropy,attention,decode,blocks] [--repeats N] [--json FILE] [--tiny]
 *
 * Covers tiles and splits of products, the workspace of cross-entropy, the scheduling of Hopper's attention, splits of
 * decoding, and block sizes of simple ops. Prints a line per size with every choice and its milliseconds (device time,
 * medians of runs that take turns), fastest first. The heuristic's choice is marked with *, followed by what it loses.
 * At the end, it prints the speed of each tile relative to the fastest for large numbers of blocks, which is `speed` in
 * gemm.ts and matmul-sm90a/product.ts. MOE_CUDA_WGMMA=1 uses the Hopper kernels. A choice whose results differ from the
 * others is reported, because it is wrong regardless of its time. `--tiny` runs everything at small sizes, as a smoke
 * test.
 */
import { writeFileSync } from 'node:fs'
import { parseArgs } from 'node:util'
import { type OpAttrs, type OpName, Random, type Shape, sizeOf, type TensorSpec, type Value } from '@moe/core'
import { createBackend } from '@moe/kernels-cuda'
import { schedule } from '../packages/kernels-cuda/src/kernels/attention-sm90a/forward.ts'
import { limits } from '../packages/kernels-cuda/src/kernels/linear-cross-entropy/linear-cross-entropy.ts'
import { choice, type Tile, tiles } from '../packages/kernels-cuda/src/kernels/matmul/tiles.ts'
import { denseHopperTiles, hopperTiles } from '../packages/kernels-cuda/src/kernels/matmul-sm90a/product.ts'
import { linears } from './shared/linears.ts'

const { values: options } = parseArgs({
  options: {
    only: { type: 'string', default: 'products,experts,entropy,attention,decode,blocks' },
    repeats: { type: 'string', default: '7' },
    json: { type: 'string' },
    tiny: { type: 'boolean', default: false },
  },
})
const repeats = options.tiny ? 1 : Number(options.repeats)
const small = options.tiny ? 64 : 1

let backend = await createBackend()
const { name: card, multiprocessors } = backend.properties
console.log(`${card}, ${multiprocessors} multiprocessors, ${backend.wgmma ? 'wgmma' : 'mma'}`)

/** One alternative for an op. */
interface Way {
  readonly name: string
  readonly set: () => void
}
interface Line {
  readonly name: string
  /** Milliseconds of each alternative. */
  readonly times: Record<string, number>
  readonly rule: string
  /** How much slower the built-in choice is than the fastest, as a fraction. */
  readonly loses: number
  /** Alternatives with different results, and their largest relative difference. */
  readonly wrong?: Record<string, number>
}
const lines: Line[] = []

const f32 = (...shape: number[]): TensorSpec => ({ shape, dtype: 'f32' })
const median = (values: readonly number[]) => [...values].sort((a, b) => a - b)[values.length >> 1]

/** Numbers between -1 and 1, repeated with a period that divides no row. */
function random(shape: Shape, dtype: 'f32' | 'bf16' = 'f32'): Value {
  const size = sizeOf(shape)
  const data = dtype === 'f32' ? new Float32Array(size) : new Uint16Array(size)
  const period = Math.min(size, 2 ** 18 + 3)
  const drawn = new Random(size).uniform(period)
  data.set(drawn.map(x => (dtype === 'f32' ? 2 * x - 1 : 0x3f00 + 0x80 * x)))
  for (let done = period; done < size; done *= 2) data.copyWithin(done, 0, done)
  return { handle: backend.upload(data, shape, dtype), shape, dtype }
}
function integers(values: readonly number[]): Value {
  const data = Int32Array.from(values)
  return { handle: backend.upload(data, [data.length], 'i32'), shape: [data.length], dtype: 'i32' }
}
function free(...values: readonly Value[]): void {
  for (const { handle } of values) backend.free(handle)
}

function launch<O extends OpName>(op: O, inputs: readonly Value[], attrs: OpAttrs[O], outputs: readonly TensorSpec[]) {
  const table = { ...backend.primitives, ...backend.fused } as Record<string, unknown>
  const kernel = table[op] as (i: readonly Value[], a: unknown, o: readonly TensorSpec[]) => unknown[]
  return kernel(inputs, attrs, outputs).map((handle, i) => ({ handle, ...outputs[i] }) as Value)
}

/** The first elements of the first result, few enough to compare quickly. Frees all results. */
async function beginning(results: readonly Value[]): Promise<Float32Array> {
  const [first] = results
  const size = sizeOf(first.shape)
  const [part] = launch('slice', [{ ...first, shape: [size] }], { starts: [0] }, [f32(Math.min(size, 2 ** 22))])
  const found = (await backend.download(part)) as Float32Array
  free(part, ...results)
  return found
}

/** Measures all alternatives for an op and the built-in choice, whose name `taken` returns. */
async function measure<O extends OpName>(
  name: string,
  op: O,
  inputs: readonly Value[],
  attrs: OpAttrs[O],
  outputs: readonly TensorSpec[],
  ways: readonly Way[],
  taken: () => string,
): Promise<void> {
  const run = () => free(...launch(op, inputs, attrs, outputs))
  const asRuled = () => {
    choice.tile = undefined
    choice.parts = undefined
  }
  asRuled()
  run()
  const rule = taken()
  const times = new Map<string, number[]>()
  const wrong: Record<string, number> = {}
  let expected: Float32Array | undefined
  for (const way of [{ name: rule, set: asRuled }, ...ways.filter(way => way.name !== rule)]) {
    asRuled()
    way.set()
    const found = await beginning(launch(op, inputs, attrs, outputs))
    expected ??= found
    const largest = expected.reduce((most, x) => Math.max(most, Math.abs(x)), 1e-30)
    const apart = found.reduce((most, x, i) => Math.max(most, Math.abs(x - (expected as Float32Array)[i])), 0) / largest
    if (!(apart < 1e-3)) wrong[way.name] = apart
    times.set(way.name, [])
  }
  for (let i = 0; i < repeats; i++) {
    for (const [way, list] of times) {
      asRuled()
      ways.find(other => other.name === way)?.set()
      list.push(await backend.elapsed(run))
    }
  }
  asRuled()
  const sorted = [...times].map(([way, list]) => [way, median(list)] as const).sort(([, a], [, b]) => a - b)
  const loses = (times.get(rule) === undefined ? 0 : median(times.get(rule) as number[])) / sorted[0][1] - 1
  lines.push({
    name,
    times: Object.fromEntries(sorted),
    rule,
    loses,
    ...(Object.keys(wrong).length > 0 ? { wrong } : {}),
  })
  const columns = sorted.slice(0, 5).map(([way, ms]) => `${way}${way === rule ? '*' : ''} ${ms.toPrecision(3)}`)
  console.log(`${name.padEnd(44)} loses ${(100 * loses).toFixed(0).padStart(3)} %   ${columns.join('   ')}`)
  for (const [way, apart] of Object.entries(wrong))
    console.log(`  WRONG RESULT: ${way}, relative difference ${apart.toExponential(1)}`)
  save()
}

// --- products: tiles and splits of k ---

const namesOf = (tiles: readonly Tile[]) => tiles.map(({ name }) => name)
const tileNames = namesOf(backend.wgmma ? hopperTiles : tiles.bf16)
const denseTileNames = namesOf(backend.wgmma ? denseHopperTiles : tiles.bf16)
const sizeOfTile = new Map([...denseHopperTiles, ...tiles.bf16].map(({ name, m, n }) => [name, { m, n }]))
const takenTile = () => choice.taken.tile as string
const takenBoth = () => `${choice.taken.tile} /${choice.taken.parts}`

async function products(): Promise<void> {
  for (const [name, [full, wide]] of Object.entries(linears)) {
    const [k, n] = [full / small, wide / small]
    const weight = random([n, k])
    for (const rows of options.tiny ? [64] : [4096, 512, 64]) {
      const x = random([rows, k])
      const ways = denseTileNames.flatMap(tile =>
        [1, 2, 3, 4, 6, 8, 12, 16]
          .filter(parts => parts === 1 || (k / parts >= 256 && rows <= 512))
          .map(parts => ({ name: `${tile} /${parts}`, set: () => Object.assign(choice, { tile, parts }) })),
      )
      const attrs = { transposeA: false, transposeB: true, precision: 'bf16' } as const
      await measure(`${name}, ${rows} rows`, 'matmul', [x, weight], attrs, [f32(rows, n)], ways, takenBoth)
      free(x)
    }
    free(weight)
  }
}

const byTile = () => tileNames.map(tile => ({ name: tile, set: () => Object.assign(choice, { tile }) }))

async function experts(): Promise<void> {
  const sizes = options.tiny
    ? [[4, 32, 64, 64]]
    : [
        [32, 1024, 7168, 2048],
        [64, 768, 1024, 512],
        [256, 32, 2048, 1024],
      ]
  for (const [count, rows, k, n] of sizes) {
    const offsets = integers(Array.from({ length: count + 1 }, (_, e) => e * rows))
    const [x, weight, dy] = [random([count * rows, k]), random([count, n, k]), random([count * rows, n])]
    const name = `${count} experts x ${rows}, ${k} to ${n}`
    const forward = { transposeW: true, precision: 'bf16' } as const
    const y = [f32(count * rows, n)]
    await measure(`${name}, forward`, 'groupedMatmul', [x, weight, offsets], forward, y, byTile(), takenTile)
    const back = { precision: 'bf16' } as const
    const dw = [f32(count, n, k)]
    await measure(`${name}, dW`, 'groupedMatmulWeightGrad', [x, dy, offsets], back, dw, byTile(), takenTile)
    free(x, weight, dy, offsets)
  }
}

// --- cross-entropy: tile of logits, and how many logits the gradient computes at once ---

async function entropy(): Promise<void> {
  const [rows, classes, features] = options.tiny ? [64, 300, 64] : [8192, 102_400, 2048]
  const inputs = [
    random([rows, features]),
    random([classes, features]),
    integers(Array.from({ length: rows }, (_, i) => (i * 31) % classes)),
  ]
  const attrs = { ignoreIndex: -100, precision: 'bf16' } as const
  const outputs = [f32(rows), f32(rows)]
  await measure('cross-entropy forward', 'linearCrossEntropy', inputs, attrs, outputs, byTile(), takenTile)
  const [loss, lse] = launch('linearCrossEntropy', inputs, attrs, outputs)
  const usual = limits.chunkBytes
  const dout = random([rows])
  const gradients = [f32(rows, features), f32(classes, features)]
  const ways = [25, 26, 27, 28, 29].map(bits => ({
    name: `2^${bits} bytes`,
    set: () => {
      limits.chunkBytes = 2 ** bits
    },
  }))
  const back = [...inputs, lse, dout]
  const taken = () => `2^${Math.log2(usual)} bytes`
  await measure('cross-entropy backward', 'linearCrossEntropyBackward', back, attrs, gradients, ways, taken)
  limits.chunkBytes = usual
  free(...inputs, loss, lse, dout)
}

// --- attention on Hopper: whether warpgroups alternate ---

async function attention(): Promise<void> {
  if (!backend.wgmma) return
  const all = options.tiny
    ? [
        [1, 300, 2, 192, 128],
        [1, 300, 2, 256, 256],
      ]
    : [
        [1, 8192, 16, 192, 128],
        [8, 1024, 16, 192, 128],
        [1, 8192, 20, 256, 256],
        [1, 8192, 16, 128, 128],
        [1, 8192, 16, 64, 64],
      ]
  for (const [batch, length, heads, dk, dv] of all) {
    const shape = [batch, length, heads]
    const inputs = [random([...shape, dk]), random([...shape, dk]), random([...shape, dv])]
    const ways = [false, true].map(turns => ({
      name: turns ? 'turns' : 'no turns',
      set: () => {
        schedule.pingpong = turns
      },
    }))
    for (const causal of [true, false]) {
      const name = `attention: ${batch} x ${length}, ${dk}/${dv}${causal ? ', causal' : ''}`
      const attrs = { causal, scale: dk ** -0.5, precision: 'bf16' } as const
      const outputs = [f32(...shape, dv), f32(batch, heads, length)]
      await measure(name, 'attention', inputs, attrs, outputs, ways, () => 'no turns')
      schedule.pingpong = false
    }
    free(...inputs)
  }
}

// --- decoding: splits of the keys ---

async function decode(): Promise<void> {
  const all = options.tiny
    ? [[2, 16, 256]]
    : [
        [1, 16, 4096],
        [1, 128, 4096],
        [1, 128, 32_768],
        [8, 16, 4096],
        [8, 128, 4096],
        [64, 16, 4096],
        [64, 128, 4096],
      ]
  for (const [batch, heads, length] of all) {
    const lengths = integers(new Array(batch).fill(length))
    const [q, cache] = [random([batch, 1, heads, 576]), random([batch, length, 576], 'bf16')]
    const ways = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
      .filter(parts => parts <= length / 64)
      .map(parts => ({ name: `/${parts}`, set: () => Object.assign(choice, { parts }) }))
    const attrs = { scale: 192 ** -0.5, valueDim: 512, precision: 'bf16' } as const
    const out = [f32(batch, 1, heads, 512)]
    const name = `decode: ${batch} x ${length} tokens, ${heads} heads`
    await measure(name, 'latentAttention', [q, cache, lengths], attrs, out, ways, () => `/${choice.taken.parts}`)
    free(q, cache, lengths)
  }
}

// --- simple ops: blocks per multiprocessor; the built-in choice is 16 ---

async function blocks(): Promise<void> {
  const size = options.tiny ? 2 ** 14 : 2 ** 27
  const usual = process.env['MOE_CUDA_MULTIPROCESSORS']
  const times: Record<string, Record<string, number>> = {}
  for (const perMultiprocessor of [4, 8, 16, 32, 64]) {
    backend.dispose()
    process.env['MOE_CUDA_MULTIPROCESSORS'] = String(Math.ceil((multiprocessors * perMultiprocessor) / 16))
    backend = await createBackend()
    const [x, gate, weight] = [random([size]), random([size]), random([1024])]
    const rows = [size / 1024, 1024]
    const ops: Record<string, () => Value[]> = {
      'neg of 2^27': () => launch('unary', [x], { code: 'neg' }, [f32(size)]),
      'swiglu of 2^27': () => launch('swiglu', [gate, x], {}, [f32(size)]),
      'rmsNorm, rows of 1024': () =>
        launch('rmsNorm', [{ ...x, shape: rows }, weight], { eps: 1e-6 }, [f32(...rows), f32(rows[0])]),
    }
    for (const [name, op] of Object.entries(ops)) {
      const run = () => free(...op())
      run()
      const list: number[] = []
      for (let i = 0; i < repeats; i++) list.push(await backend.elapsed(run))
      times[name] ??= {}
      times[name][`${perMultiprocessor} blocks`] = median(list)
    }
    free(x, gate, weight)
  }
  if (usual === undefined) delete process.env['MOE_CUDA_MULTIPROCESSORS']
  else process.env['MOE_CUDA_MULTIPROCESSORS'] = usual
  for (const [name, of] of Object.entries(times)) {
    const loses = of['16 blocks'] / Math.min(...Object.values(of)) - 1
    lines.push({ name, times: of, rule: '16 blocks', loses })
    const columns = Object.entries(of).map(([way, ms]) => `${way} ${ms.toPrecision(3)}`)
    console.log(`${name.padEnd(44)} loses ${(100 * loses).toFixed(0).padStart(3)} %   ${columns.join('   ')}`)
  }
  save()
}

/** Relative speed of each tile per element of a wave when the whole card is busy, that is in products of many rows. */
function speeds(): Record<string, number> {
  const found = new Map<string, number[]>()
  for (const { name, times } of lines) {
    const rows = Number(name.match(/, (4096) rows$/)?.[1])
    const full = name.split(',')[0] as keyof typeof linears
    if (!rows || linears[full] === undefined) continue
    const n = linears[full][1]
    const perWave = denseTileNames.map(tile => {
      const { m, n: columns } = sizeOfTile.get(tile) as { m: number; n: number }
      const waves = Math.ceil((Math.ceil(rows / m) * Math.ceil(n / columns)) / multiprocessors)
      return (waves * m * columns) / times[`${tile} /1`]
    })
    const best = Math.max(...perWave)
    for (const [i, tile] of denseTileNames.entries()) found.set(tile, [...(found.get(tile) ?? []), perWave[i] / best])
  }
  return Object.fromEntries([...found].map(([tile, list]) => [tile, median(list)]))
}

function save(): void {
  if (options.json === undefined) return
  const machine = { card, multiprocessors, wgmma: backend.wgmma }
  const all = { machine, date: new Date().toISOString(), results: lines, speeds: speeds() }
  writeFileSync(options.json, `${JSON.stringify(all, null, 2)}\n`)
}

const parts: Record<string, () => Promise<void>> = { products, experts, entropy, attention, decode, blocks }
for (const name of options.only.split(',')) {
  const part = parts[name]
  if (part === undefined) throw new Error(`--only: expected ${Object.keys(parts).join(', ')}`)
  // If one part cannot run here (memory, a missing kernel), the others still run.
  try {
    await part()
  } catch (error) {
    console.log(`${name} failed: ${error instanceof Error ? error.message : error}`)
    process.exitCode = 1
  }
}
const fast = Object.entries(speeds()).map(([tile, speed]) => `${tile} ${speed.toFixed(2)}`)
if (fast.length > 0) console.log(`relative speed of tiles: ${fast.join(', ')}`)
backend.dispose()
