// Compares random small models with Hugging Face transformers, in both directions:
//
//   node packages/deepseek/scripts/parity.ts [--seeds 16] [--from 0] [--generate 3] [--backend cpu|reference]
//
// A checkpoint saved by transformers must give the same logits and gradients here. A checkpoint saved here must open in transformers with
// the same logits, without missing or unexpected keys (including MTP layers). Greedy generation must produce the same 200 tokens, with and
// without drafts. Requires the Python environment of tools/reference/setup.sh. Exits with 1 on any difference, and with 2 without that
// environment.
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { readSafetensors, saveCheckpoint, type TensorSource } from '@moe/checkpoint'
import {
  backward,
  firstAvailable,
  fromHost,
  namedParameters,
  Random,
  scope,
  setDefaultBackend,
  tensor,
} from '@moe/core'
import { DeepSeek, type DeepSeekConfigInput, hfConfig } from '../src/index.ts'

const limits = { logits: 1e-4, gradients: 1e-3, loss: 1e-5 }
const { values: flags } = parseArgs({
  options: {
    seeds: { type: 'string', default: '16' },
    from: { type: 'string', default: '0' },
    generate: { type: 'string', default: '3' },
    backend: { type: 'string', default: 'cpu' },
  },
})
const root = resolve(import.meta.dirname, '../../..')
const python = join(root, '.venv-reference/bin/python')
if (!existsSync(python)) {
  console.error(
    'parity: .venv-reference is missing; create it with tools/reference/setup.sh (PyTorch and transformers)',
  )
  process.exit(2)
}
setDefaultBackend(
  await firstAvailable(
    flags.backend === 'cpu' ? [() => import('@moe/kernels-cpu')] : [() => import('@moe/core/reference')],
  ),
)

type Answer = { seed: number; error?: string } & Record<string, unknown>

/** Runs tools/reference/parity.py and returns its results by seed. */
function ask(what: 'export' | 'check' | 'generate', folder: string, seeds: readonly number[]): Map<number, Answer> {
  const script = join(root, 'tools/reference/parity.py')
  const { stdout, stderr, status } = spawnSync(python, ['-W', 'ignore', script, what, folder, ...seeds.map(String)], {
    encoding: 'utf8',
    maxBuffer: 2 ** 26,
    env: { ...process.env, OMP_NUM_THREADS: '1', HF_HUB_OFFLINE: '1' },
  })
  if (status !== 0) throw new Error(`${script} ${what} exited with ${status}:\n${stderr}`)
  return new Map(
    stdout
      .split('\n')
      .filter(line => line.startsWith('{'))
      .map(line => JSON.parse(line) as Answer)
      .map(answer => [answer.seed, answer]),
  )
}

/** Returns the norm of the difference divided by the norm of the expected values (at least `atLeast`). */
function distance(actual: ArrayLike<number>, expected: ArrayLike<number>, atLeast = 0): number {
  if (actual.length !== expected.length) throw new Error(`${actual.length} values, expected ${expected.length}`)
  let difference = 0
  let size = 0
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i] - expected[i]) ** 2
    size += expected[i] ** 2
  }
  return Math.sqrt(difference) / Math.max(Math.sqrt(size), atLeast, Number.MIN_VALUE)
}

const floats = async (file: TensorSource, key: string) => (await file.read(key)).data as Float32Array

/** Returns rows of T + lookahead tokens in which exactly the positions with labels carry loss. */
async function rowsOf(file: TensorSource, lookahead: number) {
  const ids = await file.read('input_ids')
  const labels = (await file.read('labels')).data as Int32Array
  const [rows, time] = ids.shape
  const length = time + lookahead
  const tokens = new Int32Array(rows * length)
  const documents = Int32Array.from({ length: rows * length }, (_, i) => i + 1)
  for (let row = 0; row < rows; row++) {
    for (let t = 0; t < time; t++) {
      tokens[row * length + t] = (ids.data as Int32Array)[row * time + t]
      if (labels[row * time + t] !== -100) documents[row * length + t] = 0
    }
  }
  return { tokens, documents, rows, length }
}

/** Compares logits, loss and gradients of a checkpoint that transformers wrote. */
async function compareTheirs(folder: string, model: DeepSeek, answer: Answer) {
  await using file = await readSafetensors(join(folder, 'theirs.safetensors'))
  const ids = await file.read('input_ids')
  const labels = (await file.read('labels')).data as Int32Array
  const vocabulary = model.config.vocab_size
  const logits = await model.infer(() => model.forward(fromHost(ids.data as Int32Array, ids.shape, 'i32'))).values()
  const theirs = await floats(file, 'logits')
  // Ignore padded positions.
  const meant = (values: ArrayLike<number>) =>
    Array.from(values).filter((_, i) => labels[Math.floor(i / vocabulary)] !== -100)
  const rows = await rowsOf(file, model.lookahead)
  const loss = scope(() => {
    const { loss } = model.loss(rows)
    const value = loss.detach()
    backward(loss)
    return value
  })
  const gradients: Array<[key: string, own: Float32Array, theirs: Float32Array]> = []
  for (const { name, parameter, slices } of namedParameters(model)) {
    if (!parameter.trainable) continue
    // The selection of keys has no gradient, and transformers has no loss for the indexers.
    if (name.includes('.indexer.')) {
      if (parameter.grad != null) throw new Error(`${name} has a gradient without a loss of the indexer`)
      continue
    }
    const own = (await parameter.grad?.values()) ?? new Float32Array(parameter.size)
    const parts = await Promise.all((slices ?? [name]).map(slice => floats(file, `grad.${slice}`)))
    gradients.push([name, own as Float32Array, Float32Array.from(parts.flatMap(part => Array.from(part)))])
    parameter.zeroGrad()
  }
  const norm = Math.sqrt(gradients.reduce((sum, [, , g]) => sum + g.reduce((s, x) => s + x * x, 0), 0))
  const worst = gradients
    .map(([key, own, theirs]) => ({ key, distance: distance(own, theirs, 1e-4 * norm) }))
    .reduce((a, b) => (b.distance > a.distance ? b : a))
  return {
    logits: distance(meant(logits), meant(theirs)),
    loss: Math.abs((await loss.item()) - (answer.loss as number)) / (answer.loss as number),
    gradients: worst.distance,
    worstGradient: worst.key,
  }
}

/** Saves a model with random weights, and its logits. */
async function writeOurs(folder: string, theirs: string, seed: number): Promise<void> {
  const config = JSON.parse(await readFile(join(theirs, 'config.json'), 'utf8')) as DeepSeekConfigInput
  const model = new DeepSeek({ ...config, initializer_range: 0.3 }, { seed })
  const random = new Random(seed).fork('bias')
  for (const { gate } of model.moeLayers) {
    const bias = gate.e_score_correction_bias
    bias?.assign(tensor(random.normal(bias.size).map(x => 0.2 * x)))
  }
  const ids = Int32Array.from({ length: 20 }, () => random.integer(model.vocabSize))
  const logits = await model.infer(() => model.forward(fromHost(ids, [2, 10], 'i32'))).values()
  await model.save(join(folder, 'ours'))
  await saveCheckpoint(join(folder, 'ours.logits'), [
    { name: 'input_ids', dtype: 'i32', shape: [2, 10], data: ids },
    { name: 'logits', dtype: 'f32', shape: [2, 10, model.vocabSize], data: logits as Float32Array },
  ])
  model.dispose()
}

const failures: string[] = []
const show = (x: unknown) => (typeof x === 'number' ? x.toExponential(1).padStart(8) : '  near tie')

async function bothWays(folder: string, seeds: readonly number[]): Promise<void> {
  const answers = ask('export', folder, seeds)
  const compared = new Map<number, Awaited<ReturnType<typeof compareTheirs>>>()
  const shapes = new Map<number, string>()
  for (const seed of seeds) {
    const at = join(folder, String(seed))
    const answer = answers.get(seed)
    if (answer === undefined || answer.error) {
      failures.push(`seed ${seed}: ${answer?.error ?? 'no result'}`)
      continue
    }
    const objective = { mtpWeight: answer.mtpWeight as number, balanceWeight: 0, indexerWeight: 0 }
    const model = await DeepSeek.fromPretrained(join(at, 'theirs'), { objective })
    const { config } = model
    shapes.set(
      seed,
      [
        answer.family,
        `${config.num_hidden_layers} layers`,
        config.model_type === 'llama'
          ? `${config.num_key_value_heads} of ${config.num_attention_heads} heads`
          : config.q_lora_rank === null
            ? 'q direct'
            : 'q lora',
        config.n_routed_experts === null || config.first_k_dense_replace >= config.num_hidden_layers
          ? 'dense'
          : `top ${config.num_experts_per_tok}, ${config.topk_group}/${config.n_group} groups, ${config.n_shared_experts} shared`,
        config.rope_scaling ? 'YaRN' : 'RoPE',
        ...(config.tie_word_embeddings ? ['tied'] : []),
        ...(config.index_topk === null ? [] : [`${config.index_topk} keys by ${config.index_n_heads} heads`]),
        ...(model.config.indexer_types?.includes('shared')
          ? [`indexers ${hfConfig(model.config).index_topk_pattern}`]
          : []),
        ...(config.num_nextn_predict_layers > 0 ? [`MTP ${config.num_nextn_predict_layers}`] : []),
      ].join(', '),
    )
    compared.set(seed, await compareTheirs(at, model, answer))
    await model.save(join(at, 'back'))
    await writeOurs(at, join(at, 'theirs'), seed)
    model.dispose()
  }
  const checked = ask('check', folder, [...compared.keys()])
  console.log('seed    logits      loss  gradients    back  ours there  model')
  for (const [seed, { logits, loss, gradients, worstGradient }] of compared) {
    const back = checked.get(seed)
    const there = back?.logits as number | null
    const cells = [show(logits), show(loss), show(gradients), back?.error ? '   fails' : '   exact', show(there)]
    console.log(`${String(seed).padStart(4)}  ${cells.join('  ')}  ${shapes.get(seed)}`)
    const fail = (wrong: boolean, what: string) => {
      if (wrong) failures.push(`seed ${seed} (${shapes.get(seed)}): ${what}`)
    }
    fail(!(logits <= limits.logits), `logits differ by ${logits}`)
    fail(!(loss <= limits.loss), `loss differs by ${loss}`)
    fail(!(gradients <= limits.gradients), `gradient of ${worstGradient} differs by ${gradients}`)
    fail(back === undefined || back.error !== undefined, `transformers: ${back?.error}`)
    fail(there !== null && !(there <= limits.logits), `logits of our checkpoint differ in transformers by ${there}`)
  }
}

async function sameText(folder: string, seeds: readonly number[]): Promise<void> {
  const answers = ask('generate', folder, seeds)
  for (const seed of seeds) {
    const answer = answers.get(seed)
    if (answer === undefined || answer.error) {
      failures.push(`generate, seed ${seed}: ${answer?.error ?? 'no result'}`)
      continue
    }
    const at = join(folder, String(seed))
    const { prompt, made } = JSON.parse(await readFile(join(at, 'generate.json'), 'utf8'))
    const model = await DeepSeek.fromPretrained(join(at, 'theirs'))
    for (const speculative of model.mtp.length > 0 ? [false, true] : [false]) {
      const own: number[] = []
      const generation = model.generate(prompt, { maxTokens: made.length, speculative })
      for await (const id of generation) own.push(id)
      const equal = own.findIndex((id, i) => id !== made[i])
      const how = speculative ? `${generation.stats.steps} passes with drafts` : 'plain'
      console.log(
        `generate, seed ${seed}: ${equal < 0 ? `${made.length} tokens equal` : `differs at token ${equal}`} (${how}; ${answer.distinct} distinct)`,
      )
      if (equal >= 0 || own.length !== made.length) failures.push(`generate, seed ${seed}: differs at token ${equal}`)
    }
    model.dispose()
  }
}

const count = (n: string, from: number, step = 1) => Array.from({ length: Number(n) }, (_, i) => from + i * step)
const folder = await mkdtemp(join(tmpdir(), 'moe-parity-'))
try {
  await bothWays(folder, count(flags.seeds, Number(flags.from)))
  await sameText(folder, count(flags.generate, 10_000 + Number(flags.from)))
} finally {
  await rm(folder, { recursive: true })
}
for (const failure of failures) console.error(`parity: ${failure}`)
if (failures.length > 0) process.exit(1)
console.log('parity: both directions agree')
