/**
 * Counts the memory traffic of kernels without a GPU. For every instruction of a training step and of decoding, it counts the 32-byte sectors of global memory that
 * warps touch and the passes over the banks of shared memory that they need, compared with the minimum for the bytes accessed.
 *
 *     node scripts/build-emulator.mjs --ptx && node scripts/traffic.ts [--wgmma] [--sparse] [--only train,decode] [--precision f32|bf16|fp8]
 *         [--weights int8] [--kernel NAME] [--least 1.1] [--json FILE]
 *
 * Prints a table of kernels and of the most expensive source lines: those whose ratio to the minimum exceeds `--least`, or with `--kernel` all lines of kernels whose
 * name contains it. Box copies and products of warpgroups (TMA, wgmma) are not counted. Runs the code that nvcc generates.
 */
import { spawnSync } from 'node:child_process'
import { existsSync, writeFileSync } from 'node:fs'
import { basename, join } from 'node:path'
import { parseArgs } from 'node:util'
import { type Precision, precisions, quantizeWeights, Random, setDefaultBackend } from '@moe/core'
import { DeepSeek, type DeepSeekConfigInput, presets } from '@moe/deepseek'
import { TokenDataset, train } from '@moe/trainer'
import koffi from 'koffi'
import { createBackend } from '../src/index.ts'

const { values: options } = parseArgs({
  options: {
    wgmma: { type: 'boolean', default: false },
    sparse: { type: 'boolean', default: false },
    only: { type: 'string', default: 'train,decode' },
    precision: { type: 'string', default: 'bf16' },
    weights: { type: 'string' },
    kernel: { type: 'string' },
    least: { type: 'string', default: '1.1' },
    json: { type: 'string' },
  },
})
const precision = options.precision as Precision
if (!precisions.includes(precision))
  throw new Error(`--precision ${precision}: expected one of ${precisions.join(', ')}`)
const folder = join(import.meta.dirname, '..', 'build', 'emulator-ptx')
const library = join(folder, 'libmoe-cuda-emulator.so')

/** Attention has V3's widths, or V3.2's with `--sparse`; everything else is as small as whole tiles allow. */
const config: DeepSeekConfigInput = {
  ...presets['1b'],
  vocab_size: 1024,
  hidden_size: 512,
  intermediate_size: 512,
  moe_intermediate_size: 256,
  num_hidden_layers: 2,
  first_k_dense_replace: 1,
  num_attention_heads: 4,
  n_routed_experts: 8,
  n_group: 4,
  topk_group: 2,
  num_experts_per_tok: 2,
  q_lora_rank: 256,
  max_position_embeddings: 512,
  ...(options.sparse ? { model_type: 'deepseek_v32', index_topk: 128, index_n_heads: 64, index_head_dim: 128 } : {}),
}
const attention = options.sparse ? ', sparse attention' : ''

/** The counts of one instruction in one kernel. */
interface Line {
  readonly kernel: string
  readonly place: string
  readonly memory: string
  readonly access: string
  readonly bytesPerLane: number
  readonly requests: number
  readonly actual: number
  readonly fewest: number
}

if (!existsSync(library)) {
  console.error(
    `${library} has not been built; run node packages/kernels-cuda/scripts/build-emulator.mjs --ptx (needs nvcc)`,
  )
  process.exit(1)
}
const emulator = koffi.load(library)
const set = emulator.func('void moe_emulator_set(const char* name, int value)')
const count = emulator.func('void moe_emulator_count(int on)')
const counted = emulator.func('const char* moe_emulator_counted()')

set('capability', options.wgmma ? 90 : 80)
set('checks', 0)
const backend = await createBackend({ driver: library, kernels: folder, wgmma: options.wgmma })
setDefaultBackend(backend)
const parts: Record<string, () => Promise<void>> = { train: trainingStep, decode: decoding }
/** Of each part, by its title. */
const found: Record<string, Line[]> = {}
for (const name of options.only.split(',')) {
  const part = parts[name]
  if (part === undefined) throw new Error(`--only ${name}: expected ${Object.keys(parts).join(', ')}`)
  await part()
}

if (options.json) writeFileSync(options.json, `${JSON.stringify(found, null, 2)}\n`)

async function trainingStep(): Promise<void> {
  const model = new DeepSeek(config, { seed: 1 })
  const random = new Random(2)
  const document = Int32Array.from({ length: 600 }, () => random.integer(config.vocab_size!))
  count(1)
  await train(model, {
    data: { training: TokenDataset.fromTokens([document]) },
    steps: 1,
    batchSize: 1,
    sequenceLength: 256,
    precision,
    progress: false,
    handleSignals: false,
  })
  await finish(`training step, ${precision}, 256 tokens${attention}`)
}

async function decoding(): Promise<void> {
  const model = new DeepSeek(config, { seed: 1 })
  const random = new Random(3)
  const prompt = Array.from({ length: 256 }, () => random.integer(config.vocab_size!))
  if (options.weights) await quantizeWeights(model, options.weights as 'int8')
  // The prompt is not counted.
  let tokens = 0
  for await (const _ of model.generate(prompt, { maxTokens: 5, precision, temperature: 0 })) {
    if (++tokens === 1) count(1)
  }
  await finish(`decoding, ${options.weights ?? precision}, 256 tokens of context${attention}`)
}

async function finish(title: string): Promise<void> {
  await backend.sync()
  const text = counted() as string
  count(0)
  const lines = readLines(text)
  print(title, lines)
  found[title] = lines
}

function readLines(text: string): Line[] {
  const rows = text
    .trim()
    .split('\n')
    .map(row => row.split(' '))
  const places = placesOf(rows.map(row => Number(row[1])))
  const lines = new Map<string, Line>()
  for (const [i, [kernel, , bytes, memory, access, requests, , actual, fewest]] of rows.entries()) {
    // The copies of an unrolled loop are one line.
    const key = [kernel, places[i], memory, access, bytes].join(' ')
    const before = lines.get(key)
    lines.set(key, {
      kernel: kernel!,
      place: places[i]!,
      memory: memory!,
      access: access!,
      bytesPerLane: Number(bytes),
      requests: (before?.requests ?? 0) + Number(requests),
      actual: (before?.actual ?? 0) + Number(actual),
      fewest: (before?.fewest ?? 0) + Number(fewest),
    })
  }
  return [...lines.values()]
}

/** `file:line` of places in the library, which are return addresses: of what was inlined there, the innermost of the kernel's own. */
function placesOf(offsets: readonly number[]): string[] {
  const input = offsets.map(offset => `0x${(offset - 1).toString(16)}`).join('\n')
  const { stdout } = spawnSync('addr2line', ['-a', '-i', '-e', library], {
    input,
    encoding: 'utf8',
    maxBuffer: 2 ** 28,
  })
  return stdout
    .trim()
    .split(/^0x.*\n/m)
    .slice(1)
    .map(frames => {
      const lines = frames
        .trim()
        .split('\n')
        .map(line => basename(line.replace(/ \(.*/, '')))
      return lines.find(line => !line.startsWith('ptx.h')) ?? lines[0]!
    })
}

function print(title: string, lines: readonly Line[]): void {
  const sum = (some: readonly Line[], memory: string, key: 'actual' | 'fewest') =>
    some.filter(line => line.memory === memory).reduce((total, line) => total + line[key], 0)
  const ratio = (some: readonly Line[], memory: string) => {
    const [actual, fewest] = [sum(some, memory, 'actual'), sum(some, memory, 'fewest')]
    return fewest === 0
      ? ''.padStart(22)
      : `${actual.toLocaleString('en').padStart(14)} ${(actual / fewest).toFixed(2).padStart(7)}`
  }
  console.log(
    `\n${title}: sectors of global memory and passes over shared memory, each with its ratio to the minimum\n`,
  )
  const kernels = [...new Set(lines.map(line => line.kernel))]
    .map(kernel => ({ kernel, own: lines.filter(line => line.kernel === kernel) }))
    .sort((a, b) => sum(b.own, 'global', 'actual') - sum(a.own, 'global', 'actual'))
  for (const { kernel, own } of kernels)
    console.log(`${kernel.padEnd(50)} ${ratio(own, 'global')} ${ratio(own, 'shared')}`)
  console.log(`${'all'.padEnd(50)} ${ratio(lines, 'global')} ${ratio(lines, 'shared')}`)
  const wasteful = lines
    .filter(line =>
      options.kernel ? line.kernel.includes(options.kernel) : line.actual > Number(options.least) * line.fewest,
    )
    .sort((a, b) => b.actual - b.fewest - (a.actual - a.fewest))
    .slice(0, options.kernel ? undefined : 40)
  console.log('\nMost expensive lines, by excess over the minimum\n')
  for (const { kernel, place, memory, access, bytesPerLane, requests, actual, fewest } of wasteful)
    console.log(
      `${kernel.padEnd(50)} ${place.padEnd(28)} ${memory} ${access.padEnd(5)} ${String(bytesPerLane).padStart(2)} B ${requests.toLocaleString('en').padStart(12)} times ${(actual / requests).toFixed(2).padStart(6)} of ${(fewest / requests).toFixed(2)}`,
    )
}
