import { access, mkdir, readdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import { describe, expect, it } from 'vitest'
import { openCheckpoint } from './open-checkpoint.ts'
import { saveCheckpoint } from './save-checkpoint.ts'
import { temporaryFolder } from './test-files.ts'
import type { TensorEntry } from './write-safetensors.ts'

const INDEX = 'model.safetensors.index.json'

/** `count` tensors of 16 bytes, filled with `value`. */
const entries = (count: number, value: number): TensorEntry[] =>
  Array.from({ length: count }, (_, i) => ({
    name: `layers.${i}.weight`,
    dtype: 'f32',
    shape: [2, 2],
    data: new Float32Array(4).fill(value),
  }))

async function valueIn(folder: string): Promise<number> {
  await using checkpoint = await openCheckpoint(folder)
  const values = new Set<number>()
  for (const key of checkpoint.keys()) values.add(Number((await checkpoint.read(key)).data[0]))
  expect(values.size, 'all tensors are of one save').toBe(1)
  return [...values][0]
}

describe('saveCheckpoint', () => {
  it('writes one file if it fits, and creates the folder', async () => {
    const folder = join(await temporaryFolder(), 'runs', 'one')
    expect(await saveCheckpoint(folder, entries(3, 1))).toEqual({ files: ['model.safetensors'], dataBytes: 48 })
    expect(await readdir(folder)).toEqual(['model.safetensors'])
    expect(await valueIn(folder)).toBe(1)
  })

  it('fills shards in order; a tensor above the limit gets its own shard', async () => {
    const folder = await temporaryFolder()
    const big: TensorEntry = { name: 'big', dtype: 'u8', shape: [100], data: new Uint8Array(100) }
    const [a, b, c, d] = entries(4, 1)
    const { files, dataBytes } = await saveCheckpoint(folder, [a, b, big, c, d], { maxShardBytes: 40 })
    expect(dataBytes).toBe(164)
    expect(files).toEqual([...[1, 2, 3].map(n => `model-0000${n}-of-00003.safetensors`), INDEX])
    expect(JSON.parse(await readFile(join(folder, INDEX), 'utf8'))).toEqual({
      metadata: { total_size: 164 },
      weight_map: {
        'layers.0.weight': files[0],
        'layers.1.weight': files[0],
        big: files[1],
        'layers.2.weight': files[2],
        'layers.3.weight': files[2],
      },
    })
  })

  it.each([
    ['one file by one file', 1e9, 1e9],
    ['one file by shards', 1e9, 40],
    ['shards by one file', 40, 1e9],
    ['shards by as many shards', 40, 40],
    ['shards by more shards', 40, 16],
  ])('replaces %s, and removes only the files of the old checkpoint', async (_, first, second) => {
    const folder = await temporaryFolder()
    await writeFile(join(folder, 'config.json'), '{}')
    await saveCheckpoint(folder, entries(4, 1), { maxShardBytes: first })
    const { files } = await saveCheckpoint(folder, entries(4, 2), { maxShardBytes: second })
    expect(await valueIn(folder)).toBe(2)
    expect((await readdir(folder)).sort()).toEqual([...files, 'config.json'].sort())
  })

  it.each([
    ['one file', 1e9, 1e9],
    ['one file, by shards', 1e9, 40],
    ['shards', 40, 40],
    ['shards, by one file', 40, 1e9],
  ])('keeps the previous checkpoint readable while saving, and if saving fails: %s', async (_, first, second) => {
    const folder = await temporaryFolder()
    await saveCheckpoint(folder, entries(4, 1), { maxShardBytes: first })
    const before = (await readdir(folder)).sort()
    const watching = entries(4, 2).map((entry, i) => ({
      ...entry,
      data: async () => {
        expect(await valueIn(folder)).toBe(1)
        if (i === 3) throw new Error('stop')
        return entry.data as Float32Array
      },
    }))
    await expect(saveCheckpoint(folder, watching, { maxShardBytes: second })).rejects.toThrow('stop')
    expect(await valueIn(folder)).toBe(1)
    expect((await readdir(folder)).sort()).toEqual(before)
  })

  // The old shard is a folder because a folder cannot be removed as a file, like an open file on Windows.
  it('succeeds if an old shard cannot be removed', async () => {
    const folder = await temporaryFolder()
    await mkdir(join(folder, 'old.safetensors'))
    await writeFile(join(folder, INDEX), JSON.stringify({ weight_map: { a: 'old.safetensors' } }))
    const { files } = await saveCheckpoint(folder, entries(4, 1), { maxShardBytes: 40 })
    expect(await valueIn(folder)).toBe(1)
    expect((await readdir(folder)).sort()).toEqual([...files, 'old.safetensors'].sort())
  })

  it('fails and leaves no shards if the old single file cannot be removed', async () => {
    const folder = await temporaryFolder()
    await mkdir(join(folder, 'model.safetensors'))
    await expect(saveCheckpoint(folder, entries(4, 1), { maxShardBytes: 40 })).rejects.toMatchObject({
      code: 'E_CHECKPOINT',
      message: expect.stringMatching(/model.safetensors: removing failed.*still the checkpoint/),
    })
    expect(await readdir(folder)).toEqual(['model.safetensors'])
  })

  it('does not remove files that a corrupt or malicious index names', async () => {
    const root = await temporaryFolder()
    const folder = join(root, 'model')
    const precious = join(root, 'precious.safetensors')
    await writeFile(precious, 'x')
    await saveCheckpoint(folder, entries(4, 1), { maxShardBytes: 40 })
    await writeFile(join(folder, 'notes.txt'), 'x')
    await writeFile(join(folder, INDEX), JSON.stringify({ weight_map: { a: '../precious.safetensors' } }))
    await saveCheckpoint(folder, entries(1, 2))
    await access(precious)
    await writeFile(join(folder, INDEX), JSON.stringify({ weight_map: { a: 'notes.txt' } }))
    await saveCheckpoint(folder, entries(1, 3))
    await access(join(folder, 'notes.txt'))
    expect(await valueIn(folder)).toBe(3)
  })

  it('keeps tensors named like properties of every object', async () => {
    const folder = await temporaryFolder()
    const names = ['__proto__', 'constructor', 'toString']
    const list = names.map((name, i): TensorEntry => ({ name, dtype: 'u8', shape: [1], data: Uint8Array.of(i) }))
    for (const maxShardBytes of [1, 100]) {
      await saveCheckpoint(folder, list, { maxShardBytes })
      await using checkpoint = await openCheckpoint(folder)
      expect(checkpoint.keys()).toEqual(names)
      for (const [i, name] of names.entries()) expect((await checkpoint.read(name)).data).toEqual(Uint8Array.of(i))
    }
  })

  it('called several times at once gives the last checkpoint, not a mixture', async () => {
    const folder = await temporaryFolder()
    let first = 0
    const slow = (value: number) =>
      entries(4, value).map((entry, i) => ({
        ...entry,
        data: async () => {
          // The second call would overtake the first.
          if (value === 1) await setTimeout(first++ === 0 ? 50 : 0)
          return i === 3 && value === 2 ? Promise.reject(new Error('stop')) : (entry.data as Float32Array)
        },
      }))
    const saves = [1, 2, 3].map(value => saveCheckpoint(folder, slow(value), { maxShardBytes: 16 }))
    expect((await Promise.allSettled(saves)).map(({ status }) => status)).toEqual([
      'fulfilled',
      'rejected',
      'fulfilled',
    ])
    expect(await valueIn(folder)).toBe(3)
    expect(await readdir(folder)).toHaveLength(5)
  })

  it('keeps metadata in the index of shards', async () => {
    const folder = await temporaryFolder()
    for (const maxShardBytes of [16, 100]) {
      await saveCheckpoint(folder, entries(4, 1), { maxShardBytes, metadata: { step: '5' } })
      await using checkpoint = await openCheckpoint(folder)
      expect(checkpoint.metadata).toMatchObject({ step: '5' })
    }
  })

  it('rejects invalid limits, and duplicate names across shards', async () => {
    const folder = await temporaryFolder()
    for (const maxShardBytes of [0, -1, Number.NaN]) {
      await expect(saveCheckpoint(folder, entries(1, 1), { maxShardBytes })).rejects.toThrow(/pass a positive number/)
    }
    const twice = [...entries(3, 1), ...entries(1, 1)]
    await expect(saveCheckpoint(folder, twice, { maxShardBytes: 16 })).rejects.toThrow(/"layers.0.weight" occurs twice/)
    expect(await readdir(folder)).toEqual([])
  })
})
