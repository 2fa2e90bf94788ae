import { mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import {
  addAdapters,
  type Backend,
  Linear,
  Module,
  namedAdapters,
  namedParameters,
  Parameter,
  quantizeWeights,
  Random,
  randn,
  SwigluMlp,
  setDefaultBackend,
  trainable,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { beforeEach, describe, expect, test } from 'vitest'
import { readSafetensors } from '../read-safetensors.ts'
import { saveCheckpoint } from '../save-checkpoint.ts'
import { temporaryFolder } from '../test-files.ts'
import { fromF32 } from '../to-f32.ts'
import { type TensorEntry, writeSafetensors } from '../write-safetensors.ts'
import { adapterBase, loadAdapters } from './load-adapters.ts'
import { saveAdapters } from './save-adapters.ts'

let backend: Backend
let folder: string
beforeEach(async () => {
  backend = referenceBackend()
  setDefaultBackend(backend)
  folder = await temporaryFolder()
})

/** Contains every kind of parameter: linear layers, stacked expert weights, a matrix of its own and a vector. */
class Block extends Module {
  mix = new Linear(6, 4, { random: new Random(1) })
  net = new SwigluMlp(6, 5, { random: new Random(2) })
  up_proj = new Parameter(randn([3, 5, 6], new Random(3)))
  table = new Parameter(randn([5, 6], new Random(4)))
  scale = new Parameter(randn([6], new Random(5)))
  override readonly quantizable = ['up_proj']
  override readonly stacked = { up_proj: (i: number) => `${i}.up_proj.weight` }
}

function adapted(seed = 7): Block {
  const block = new Block()
  addAdapters(block, { rank: 2, alpha: 5 })
  for (const [i, { adapter }] of namedAdapters(block).entries())
    adapter.up.assign(randn(adapter.up.shape, new Random(seed + i)))
  return block
}

const valuesOf = (block: Block) =>
  Promise.all(namedAdapters(block).flatMap(({ adapter: { down, up } }) => [down.values(), up.values()]))

const tensorFile = (at = folder) => join(at, 'adapter_model.safetensors')
const configFile = (at = folder) => join(at, 'adapter_config.json')
const readConfig = async () => JSON.parse(await readFile(configFile(), 'utf8')) as Record<string, unknown>
const changeConfig = async (changes: object) =>
  writeFile(configFile(), JSON.stringify({ ...(await readConfig()), ...changes }))

/** Rewrites the tensor file with changed entries and without the digest of the base. */
async function changeTensors(change: (entries: TensorEntry[]) => TensorEntry[]): Promise<void> {
  await using file = await readSafetensors(tensorFile())
  const entries: TensorEntry[] = []
  for (const name of file.keys()) {
    const { dtype, shape, data } = await file.read(name)
    entries.push({ name, dtype, shape, data })
  }
  await rm(tensorFile())
  await writeSafetensors(tensorFile(), change(entries), { metadata: { format: 'pt' } })
}

describe('saved adapters', () => {
  test('load into a base without adapters, and into adapters of the same shape', async () => {
    const block = adapted()
    await saveAdapters(folder, block, { base: 'some/model' })
    const fresh = new Block()
    await loadAdapters(fresh, folder)
    expect(await valuesOf(fresh)).toEqual(await valuesOf(block))
    expect(namedAdapters(fresh).map(({ name, adapter }) => [name, adapter.scale])).toEqual(
      namedAdapters(block).map(({ name, adapter }) => [name, adapter.scale]),
    )
    expect(trainable(fresh).length).toBe(2 * namedAdapters(block).length)
    const other = adapted(50)
    await loadAdapters(other, folder)
    expect(await valuesOf(other)).toEqual(await valuesOf(block))
  })

  test("are written as PEFT's config and tensor file, with its keys", async () => {
    await saveAdapters(folder, adapted(), { base: 'some/model' })
    expect(await readConfig()).toMatchObject({
      base_model_name_or_path: 'some/model',
      peft_type: 'LORA',
      r: 2,
      lora_alpha: 5,
      target_modules: ['down_proj', 'gate_proj', 'mix', 'up_proj'],
    })
    await using file = await readSafetensors(tensorFile())
    const shapes = Object.fromEntries(file.keys().map(key => [key, file.info(key).shape]))
    expect(shapes).toMatchObject({
      'base_model.model.mix.lora_A.weight': [2, 6],
      'base_model.model.mix.lora_B.weight': [4, 2],
      'base_model.model.2.up_proj.lora_A.weight': [2, 6],
      'base_model.model.2.up_proj.lora_B.weight': [5, 2],
    })
    expect(file.keys().length).toBe(2 * (1 + 3 + 3))
  })

  test('list full paths of weights in target_modules if the last path segment is ambiguous', async () => {
    const block = new Block()
    addAdapters(block, { rank: 1, targets: ['net.up_proj', 'mix'] })
    await saveAdapters(folder, block)
    expect((await readConfig())['target_modules']).toEqual(['mix', 'net.up_proj'])
  })

  test('of a quantized base load into a dense one, and vice versa', async () => {
    const block = adapted()
    await quantizeWeights(block, 'int8')
    await saveAdapters(folder, block)
    const dense = new Block()
    await loadAdapters(dense, folder)
    await saveAdapters(join(folder, 'again'), dense)
    const stored = new Block()
    await quantizeWeights(stored, 'int4')
    await loadAdapters(stored, join(folder, 'again'))
    expect(await valuesOf(stored)).toEqual(await valuesOf(block))
  })

  test('may be in bf16, and use the scale of rank-stabilized LoRA', async () => {
    const block = adapted()
    await saveAdapters(folder, block)
    await changeTensors(entries =>
      entries.map(entry => ({ ...entry, dtype: 'bf16', data: fromF32('bf16', entry.data as Float32Array) })),
    )
    await changeConfig({ use_rslora: true })
    const fresh = new Block()
    await loadAdapters(fresh, folder)
    expect(namedAdapters(fresh)[0].adapter.scale).toBeCloseTo(5 / Math.sqrt(2), 12)
    const [[first], [expected]] = [await valuesOf(fresh), await valuesOf(block)]
    expect(Math.abs(first[0] / expected[0] - 1)).toBeLessThan(2 ** -8)
  })

  test('are not written for a module without adapters, or with other trainable parameters', async () => {
    await expect(saveAdapters(folder, new Block())).rejects.toMatchObject({ code: 'E_CONFIG' })
    const block = adapted()
    block.scale.trainable = true
    await expect(saveAdapters(folder, block)).rejects.toThrow(/scale is trainable but not an adapter/)
  })

  test('can belong to a single layer', async () => {
    const layer = new Linear(3, 2)
    addAdapters(layer, { rank: 1 })
    await saveAdapters(folder, layer)
    const fresh = new Linear(3, 2)
    await loadAdapters(fresh, folder)
    expect(await fresh.weight.adapter?.down.values()).toEqual(await layer.weight.adapter?.down.values())
  })
})

describe('loadAdapters rejects, without changing the module:', () => {
  const expectRejection = async (message: RegExp, block = new Block()) => {
    const before = await Promise.all(namedParameters(block).map(({ parameter }) => parameter.values()))
    const trainableBefore = trainable(block).length
    const { handles } = backend.stats()
    await expect(loadAdapters(block, folder)).rejects.toThrow(message)
    await expect(loadAdapters(block, folder)).rejects.toMatchObject({ code: 'E_CHECKPOINT' })
    expect(await Promise.all(namedParameters(block).map(({ parameter }) => parameter.values()))).toEqual(before)
    expect(trainable(block).length).toBe(trainableBefore)
    expect(backend.stats().handles).toBe(handles)
  }
  beforeEach(() => saveAdapters(folder, adapted()))

  test('missing files', async () => {
    folder = join(folder, 'none')
    await expectRejection(/adapter_config\.json.*no such file/s)
    await mkdir(folder)
    await writeFile(configFile(), '{"peft_type":"LORA","r":2,"lora_alpha":4}')
    await expectRejection(/adapter_model\.safetensors.*no such file/s)
    await rm(configFile())
    await mkdir(configFile())
    await expectRejection(/not a regular file/)
  })

  test.each<[string, RegExp]>([
    ['', /invalid JSON/],
    ['[]', /expected a JSON object/],
    ['{"r":1,"r":2}', /duplicate key/],
    ['{'.repeat(100), /nested/],
    ['{"peft_type":"LOHA"}', /peft_type is "LOHA"/],
  ])('the config %j', async (text, message) => {
    await writeFile(configFile(), text)
    await expectRejection(message)
  })

  test.each<[string, unknown]>([
    ['r', 0],
    ['r', 1e300],
    ['r', '2'],
    ['lora_alpha', 0],
    ['lora_alpha', null],
    ['bias', 'all'],
    ['use_dora', true],
    ['fan_in_fan_out', true],
    ['modules_to_save', ['lm_head']],
    ['rank_pattern', { mix: 4 }],
    ['target_parameters', ['experts.gate_up_proj']],
    ['init_lora_weights', 'pissa'],
  ])('the config field %s: %j', async (field, value) => {
    await changeConfig({ [field]: value })
    await expectRejection(new RegExp(`: ${field} is `))
  })

  test('a rank that differs from the shapes of the tensors, however large', async () => {
    await changeConfig({ r: 3 })
    await expectRejection(/has shape \[2,6\], expected \[3,6\] for rank 3/)
    await changeConfig({ r: 2 ** 50 })
    await expectRejection(/for rank 1125899906842624/)
  })

  test.each<[string, RegExp, (entries: TensorEntry[]) => TensorEntry[]]>([
    ['no adapters', /no adapters/, () => []],
    [
      'a missing lora_B',
      /lora_B.weight" is missing/,
      entries => entries.filter(({ name }) => !name.includes('mix.lora_B')),
    ],
    [
      'a missing expert',
      /only 2 of the 3 experts/,
      entries => entries.filter(({ name }) => !name.includes('model.1.up_proj')),
    ],
    [
      'an adapter of an unknown weight',
      /the module has no weight matrix "mux"/,
      entries => entries.map(entry => ({ ...entry, name: entry.name.replace('mix', 'mux') })),
    ],
    [
      'an adapter of a vector',
      /the module has no weight matrix "scale"/,
      entries => entries.map(entry => ({ ...entry, name: entry.name.replace('mix', 'scale') })),
    ],
    [
      'an adapter of a matrix that takes no adapters',
      /table/,
      entries => entries.map(entry => ({ ...entry, name: entry.name.replace('net.up_proj', 'table') })),
    ],
    [
      'a key without lora_A or lora_B',
      /is not the key of an adapter matrix/,
      entries => [
        ...entries,
        { name: 'base_model.model.mix.weight', dtype: 'f32', shape: [1], data: new Float32Array(1) },
      ],
    ],
    [
      "PEFT's adapters of embeddings",
      /is not the key of an adapter matrix/,
      entries => entries.map(entry => ({ ...entry, name: entry.name.replace('lora_', 'lora_embedding_') })),
    ],
    [
      'keys with another prefix',
      /is not the key of an adapter matrix/,
      entries => entries.map(entry => ({ ...entry, name: entry.name.slice(1) })),
    ],
    [
      'transposed matrices',
      /has shape \[6,2\], expected \[2,6\]/,
      entries => entries.map(entry => ({ ...entry, shape: [...entry.shape].reverse() })),
    ],
    [
      'NaN',
      /contains NaN at index 3/,
      entries =>
        entries.map(entry =>
          entry.name.includes('net.gate_proj.lora_A')
            ? { ...entry, data: (entry.data as Float32Array).map((x, i) => (i === 3 ? Number.NaN : x)) }
            : entry,
        ),
    ],
    [
      'Infinity',
      /contains Infinity/,
      entries =>
        entries.map(entry =>
          entry.name.includes('lora_B')
            ? { ...entry, data: new Float32Array((entry.data as Float32Array).length).fill(Number.POSITIVE_INFINITY) }
            : entry,
        ),
    ],
  ])('tensors: %s', async (_, message, change) => {
    await changeTensors(change)
    await expectRejection(message)
  })

  test('a truncated file', async () => {
    const bytes = await readFile(tensorFile())
    for (const length of [0, 7, 60, bytes.length - 1]) {
      await writeFile(tensorFile(), bytes.subarray(0, length))
      await expectRejection(/adapter_model\.safetensors/)
    }
  })

  test('adapters of a base with other values or shapes of vectors and matrices', async () => {
    const scaled = new Block()
    scaled.scale.assign(scaled.scale.mul(1.1).detach())
    await expectRejection(/a different base model/, scaled)
    const larger = Object.assign(new Block(), { table: new Parameter(randn([7, 6], new Random(1))) })
    await expectRejection(/a different base model/, larger)
  })

  test('adapters that differ from those of the module in rank, targets or alpha', async () => {
    const other = new Block()
    addAdapters(other, { rank: 3, alpha: 5 })
    await expectRejection(/which differ from those of the module/, other)
    const fewer = new Block()
    addAdapters(fewer, { rank: 2, alpha: 5, targets: ['mix'] })
    await expectRejection(/which differ from those of the module/, fewer)
    const otherAlpha = new Block()
    addAdapters(otherAlpha, { rank: 2, alpha: 6 })
    await expectRejection(/which differ from those of the module/, otherAlpha)
  })
})

describe('adapterBase', () => {
  test('returns the folder of the base model, resolved from the folder of the adapters', async () => {
    const base = join(folder, 'base')
    await saveCheckpoint(base, [])
    await writeFile(join(base, 'config.json'), '{}')
    const own = join(folder, 'own')
    await saveAdapters(own, adapted(), { base })
    expect(await adapterBase(own)).toBe(base)
    await saveAdapters(own, adapted(), { base: '../base' })
    expect(await adapterBase(own)).toBe(base)
    expect(await adapterBase(base)).toBeUndefined()
    expect(await adapterBase(join(folder, 'none'))).toBeUndefined()
  })

  test.each([undefined, 'owner/name', '/none'])('rejects a base model that is not a local folder: %s', async base => {
    await saveAdapters(folder, adapted(), { base })
    await expect(adapterBase(folder)).rejects.toThrow(
      base === undefined ? /names no base model/ : /is not a folder on this machine/,
    )
  })
})
