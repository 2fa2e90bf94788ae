import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { readSafetensors } from '@moe/checkpoint'
import { defaultBackend, namedParameters, Random, setDefaultBackend, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { afterAll, describe, expect, test } from 'vitest'
import { DeepSeek, loadWeights } from './index.ts'
import { tiny } from './test-tiny.ts'

setDefaultBackend(referenceBackend())

const folder = await mkdtemp(join(tmpdir(), 'moe-deepseek-'))
afterAll(() => rm(folder, { recursive: true }))

test('a checkpoint opens without generating random weights', async () => {
  const model = new DeepSeek(tiny, { seed: 1 })
  const at = join(folder, 'undrawn')
  await model.save(at)
  const { normal } = Random.prototype
  Random.prototype.normal = () => {
    throw new Error('random weights')
  }
  const reopened = await DeepSeek.fromPretrained(at).finally(() => {
    Random.prototype.normal = normal
  })
  for (const loaded of [reopened, await DeepSeek.fromPretrained(at, { weights: 'int8' })]) {
    expect(loaded.config.initializer_range).toBe(model.config.initializer_range)
    loaded.dispose()
  }
  model.dispose()
})

describe('checkpoints', () => {
  test('a folder or file that cannot be written is an error that names it', async () => {
    const model = new DeepSeek(tiny, { seed: 7 })
    const file = join(folder, 'file')
    await writeFile(file, '')
    await expect(model.save(file)).rejects.toMatchObject({ code: 'E_CHECKPOINT', op: file })
    const taken = join(folder, 'taken', 'config.json')
    await mkdir(taken, { recursive: true })
    await expect(model.save(join(folder, 'taken'))).rejects.toMatchObject({ code: 'E_CHECKPOINT', op: taken })
    model.dispose()
  })

  test('a saved model opens as the same model, including MTP and balance bias', async () => {
    const model = new DeepSeek(tiny, { seed: 7 })
    const bias = new Random(1).normal(8)
    model.moeLayers[0].gate.e_score_correction_bias?.assign(tensor(bias))
    await model.save(join(folder, 'saved'))
    const reopened = await DeepSeek.fromPretrained(join(folder, 'saved'))
    expect(reopened.config).toEqual(model.config)
    for (const [i, { name, parameter }] of namedParameters(model).entries()) {
      const other = namedParameters(reopened)[i]
      expect(other.name).toBe(name)
      assertClose(name, await other.parameter.values(), await parameter.values(), { relative: 0, absolute: 0 })
    }
    await using file = await readSafetensors(join(folder, 'saved', 'model.safetensors'))
    for (const key of [
      'model.layers.2.embed_tokens.weight',
      'model.layers.2.shared_head.head.weight',
      'model.layers.2.eh_proj.weight',
      'model.layers.1.mlp.experts.7.down_proj.weight',
    ]) {
      expect(file.has(key), key).toBe(true)
    }
    model.dispose()
    reopened.dispose()
  })

  test('saving over another model that fails leaves its config.json', async () => {
    const at = join(folder, 'other-config')
    const first = new DeepSeek({ ...tiny, rope_theta: 5e3 }, { seed: 1 })
    const second = new DeepSeek(tiny, { seed: 2 })
    await first.save(at)
    const configIn = () => readFile(join(at, 'config.json'), 'utf8').catch(() => null)
    const before = await configIn()
    // A folder in the place of the weights cannot be replaced.
    await rm(join(at, 'model.safetensors'))
    await mkdir(join(at, 'model.safetensors', 'full'), { recursive: true })
    await expect(second.save(at)).rejects.toMatchObject({ code: 'E_CHECKPOINT' })
    expect(await configIn()).toBe(before)
    await rm(join(at, 'model.safetensors'), { recursive: true })
    await second.save(at)
    expect(await configIn()).not.toBe(before)
    for (const model of [first, second]) model.dispose()
  })

  test('config.json has floats as transformers requires, and empty matrices for missing shared experts', async () => {
    const config = {
      ...tiny,
      n_shared_experts: 0,
      routed_scaling_factor: 1,
      rope_theta: 10000,
      n_group: null,
      topk_group: null,
    }
    const model = new DeepSeek(config)
    const at = join(folder, 'no-shared')
    await model.save(at)
    const text = await readFile(join(at, 'config.json'), 'utf8')
    expect(text).toMatch(/"routed_scaling_factor": 1\.0,/)
    expect(text).toMatch(/"rope_theta": 10000\.0,/)
    expect(JSON.parse(text)).toMatchObject({ n_group: 1, topk_group: 1, vocab_size: 40 })
    await using file = await readSafetensors(join(at, 'model.safetensors'))
    expect(file.info('model.layers.1.mlp.shared_experts.gate_proj.weight').shape).toEqual([0, 24])
    expect(file.info('model.layers.2.mlp.shared_experts.down_proj.weight').shape).toEqual([24, 0])
    const reopened = await DeepSeek.fromPretrained(at)
    expect(reopened.config.n_shared_experts).toBe(0)
    model.dispose()
    reopened.dispose()
  })

  test('end tokens of generation_config.json are added to those of config.json', async () => {
    const at = join(folder, 'chat')
    const opened = async (config: number | null, generation: unknown) => {
      const model = new DeepSeek({ ...tiny, eos_token_id: config })
      await model.save(at)
      model.dispose()
      await writeFile(join(at, 'generation_config.json'), JSON.stringify(generation))
      const reopened = await DeepSeek.fromPretrained(at)
      reopened.dispose()
      return reopened
    }
    expect((await opened(5, { eos_token_id: 6 })).endTokens).toEqual([5, 6])
    expect((await opened(5, { eos_token_id: [7, 5] })).endTokens).toEqual([5, 7])
    expect((await opened(5, { eos_token_id: 5 })).config.eos_token_id).toBe(5)
    expect((await opened(5, { temperature: 0.6 })).config.eos_token_id).toBe(5)
    expect((await opened(null, { eos_token_id: [6] })).endTokens).toEqual([6])
    await expect(opened(5, { eos_token_id: 'end' })).rejects.toThrow(expect.objectContaining({ code: 'E_CONFIG' }))
    await writeFile(join(at, 'generation_config.json'), '{')
    await expect(DeepSeek.fromPretrained(at)).rejects.toThrow(/generation_config\.json: cannot be read: /)
  })

  test('a checkpoint of another model is rejected, with missing keys and different shapes', async () => {
    const model = new DeepSeek(tiny)
    await model.save(join(folder, 'other'))
    await writeFile(
      join(folder, 'other', 'config.json'),
      JSON.stringify({ ...tiny, num_hidden_layers: 3, hidden_size: 28 }),
    )
    await expect(DeepSeek.fromPretrained(join(folder, 'other'))).rejects.toThrow(
      /missing[\s\S]*model\.embed_tokens\.weight: stored \[40,24\], model \[40,28\]/,
    )
    model.dispose()
  })
})

test('a model too large for its checkpoint is rejected before memory is allocated', async () => {
  const model = new DeepSeek(tiny)
  const at = join(folder, 'huge')
  await model.save(at)
  const { peakBytes } = defaultBackend().stats()
  for (const huge of [{ vocab_size: 2 ** 40 }, { num_hidden_layers: 10_000 }, { n_routed_experts: 2 ** 20 }]) {
    await writeFile(join(at, 'config.json'), JSON.stringify({ ...tiny, ...huge }))
    await expect(DeepSeek.fromPretrained(at)).rejects.toThrow(
      expect.objectContaining({ code: 'E_STATE_DICT', message: expect.stringMatching(/describes a model of \d/) }),
    )
  }
  expect(defaultBackend().stats().peakBytes).toBe(peakBytes)
  model.dispose()
})

test('a folder may be a file URL, and config.json begin with a byte order mark', async () => {
  const at = pathToFileURL(join(folder, 'by URL'))
  const model = new DeepSeek(tiny, { seed: 1 })
  await model.save(at)
  const config = new URL(`${at}/config.json`)
  await writeFile(config, `\uFEFF${await readFile(config, 'utf8')}`)
  const reopened = await DeepSeek.fromPretrained(at)
  await loadWeights(reopened, at)
  expect(await reopened.lm_head.weight.values()).toEqual(await model.lm_head.weight.values())
  for (const opened of [model, reopened]) opened.dispose()
  const none = undefined as unknown as string
  for (const call of [() => DeepSeek.fromPretrained(none), () => model.save(none), () => loadWeights(model, none)])
    await expect(call()).rejects.toMatchObject({
      code: 'E_ATTR',
      message: expect.stringContaining('expected a path, got undefined'),
    })
})

test('a model is opened from a URL, and from File objects', async () => {
  const at = join(folder, 'published')
  const model = new DeepSeek(tiny, { seed: 1 })
  await model.save(at)
  const requested: string[] = []
  const answer = async (address: string) => {
    requested.push(address)
    const body = await readFile(join(at, address.replace('https://example.org/m/', ''))).catch(() => null)
    return new Response(body, { status: body ? 200 : 404 })
  }
  let last = { bytes: 0, totalBytes: 1 }
  const onProgress = (progress: typeof last) => {
    last = progress
  }
  const fromUrl = await DeepSeek.fromPretrained('https://example.org/m', {
    fetch: answer,
    onProgress,
    weights: 'bf16',
  })
  expect(last.bytes).toBe(last.totalBytes)
  expect(new Set(requested)).toEqual(
    new Set(
      ['config.json', 'generation_config.json', 'model.safetensors'].map(name => `https://example.org/m/${name}`),
    ),
  )
  const names = ['config.json', 'model.safetensors']
  const files = await Promise.all(names.map(async name => new File([await readFile(join(at, name))], name)))
  const fromFiles = await DeepSeek.fromPretrained(files)
  expect(await fromFiles.lm_head.weight.values()).toEqual(await model.lm_head.weight.values())
  await loadWeights(fromFiles, new URL('https://example.org/m'), { fetch: answer })
  for (const opened of [model, fromUrl, fromFiles]) opened.dispose()
  await expect(DeepSeek.fromPretrained('https://example.org/other', { fetch: answer })).rejects.toThrow(
    'https://example.org/other/config.json: cannot be read: no such file; pass a folder',
  )
  const signal = AbortSignal.abort()
  await expect(DeepSeek.fromPretrained(at, { signal })).rejects.toMatchObject({ code: 'E_ABORTED' })
})

test('a config.json that is a folder is rejected', async () => {
  const at = join(folder, 'no-file')
  await mkdir(join(at, 'config.json'), { recursive: true })
  await expect(DeepSeek.fromPretrained(at)).rejects.toThrow(
    /config\.json: cannot be read: .*expected a file, got a folder/,
  )
})
