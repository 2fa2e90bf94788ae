import { copyFile, cp, mkdir, readdir, readFile, readlink, rename, rm, symlink, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { openCheckpoint } from './open-checkpoint.ts'
import { fixture, rawFile, temporaryFolder } from './test-files.ts'

const shard = (n: number) => `model-0000${n}-of-00003.safetensors`
const INDEX = 'model.safetensors.index.json'

interface Index {
  metadata?: unknown
  weight_map: Record<string, unknown>
}

/** A copy of the sharded fixture whose index was edited. */
async function sharded(edit: (index: Index) => void = () => {}): Promise<string> {
  const folder = join(await temporaryFolder(), 'model')
  await cp(fixture('sharded'), folder, { recursive: true })
  const index = JSON.parse(await readFile(join(folder, INDEX), 'utf8')) as Index
  edit(index)
  await writeFile(join(folder, INDEX), JSON.stringify(index))
  return folder
}

/** Returns the files in the folder that this process has open; only on Linux. */
async function openFiles(folder: string): Promise<string[]> {
  if (process.platform !== 'linux') return []
  const links = (await readdir('/proc/self/fd')).map(fd => readlink(`/proc/self/fd/${fd}`).catch(() => ''))
  return (await Promise.all(links)).filter(path => path.startsWith(folder))
}

describe('a sharded checkpoint', () => {
  it('reads as one', async () => {
    const { shardedSums } = JSON.parse(await readFile(fixture('files.json'), 'utf8')) as {
      shardedSums: Record<string, number>
    }
    await using checkpoint = await openCheckpoint(fixture('sharded'))
    expect(checkpoint.metadata).toEqual({ total_size: '272' })
    expect(checkpoint.keys().sort()).toEqual(Object.keys(shardedSums).sort())
    expect(checkpoint.info('lm_head.weight').file).toBe(join(fixture('sharded'), shard(3)))
    expect(checkpoint.info('model.layers.0.mlp.up_proj.weight').dtype).toBe('bf16')
    const { data } = await checkpoint.read('lm_head.weight')
    const sum = (data as Float32Array).reduce((a, b) => a + b, 0)
    expect(sum).toBeCloseTo(shardedSums['lm_head.weight'], 5)
    await expect(checkpoint.read('norm.weight')).rejects.toThrow(
      /no tensor "norm.weight"; similar names: "model.norm.weight"/,
    )
  })

  it('opens from its index file, with metadata of any type', async () => {
    const folder = await sharded(index => {
      index.metadata = { total_size: 272, nested: { a: [1] } }
    })
    await using checkpoint = await openCheckpoint(join(folder, INDEX))
    expect(checkpoint.metadata).toEqual({ total_size: '272', nested: '{"a":[1]}' })
  })

  it('accepts an index with a byte order mark', async () => {
    const folder = await sharded()
    await writeFile(join(folder, INDEX), `\uFEFF${await readFile(join(folder, INDEX), 'utf8')}`)
    await using checkpoint = await openCheckpoint(folder)
    expect(checkpoint.has('lm_head.weight')).toBe(true)
  })

  it('is ignored if model.safetensors exists', async () => {
    const folder = await sharded()
    await copyFile(fixture('dtypes.safetensors'), join(folder, 'model.safetensors'))
    await using checkpoint = await openCheckpoint(folder)
    expect(checkpoint.has('f32')).toBe(true)
    expect(checkpoint.has('lm_head.weight')).toBe(false)
  })

  it('closes opened shards if a later one is invalid', async () => {
    const folder = await sharded()
    await writeFile(join(folder, shard(2)), new Uint8Array(3)) // the last that the index names
    await expect(openCheckpoint(folder)).rejects.toThrow(`${join(folder, shard(2))}: 3 bytes are too few`)
    expect(await openFiles(folder)).toEqual([])
  })
})

describe('an invalid index', () => {
  it.each<[string, (index: Index) => void, RegExp]>([
    ['without weight_map', index => Reflect.deleteProperty(index, 'weight_map'), /no "weight_map" object/],
    ['with a list for weight_map', index => Object.assign(index, { weight_map: [] }), /no "weight_map" object/],
    ['with a number for a file', index => Object.assign(index.weight_map, { a: 3 }), /assigns tensor "a" to 3/],
    [
      'with a path out of the folder',
      index => Object.assign(index.weight_map, { a: '../x.safetensors' }),
      /to "..\/x.safetensors"; shards must/,
    ],
    ['with the parent folder as a file', index => Object.assign(index.weight_map, { a: '..' }), /to ".."/],
    ['with an absolute path', index => Object.assign(index.weight_map, { a: '/etc/passwd' }), /to "\/etc\/passwd"/],
    ['with a backslash', index => Object.assign(index.weight_map, { a: '..\\x' }), /plain file names/],
    ['with a NUL', index => Object.assign(index.weight_map, { a: 'a\0b' }), /plain file names/],
    [
      'naming a file that is missing',
      index => Object.assign(index.weight_map, { a: 'x.safetensors' }),
      /opening failed: no such file/,
    ],
    [
      'naming a tensor that is missing',
      index => Object.assign(index.weight_map, { a: shard(1) }),
      /tensor "a" is missing in model-00001/,
    ],
    [
      'without a tensor of a shard',
      index => Reflect.deleteProperty(index.weight_map, 'model.norm.weight'),
      /contains tensor "model.norm.weight", but the index does not contain it/,
    ],
    [
      'putting a tensor into another shard',
      index => Object.assign(index.weight_map, { 'lm_head.weight': shard(1) }),
      /tensor "lm_head.weight" is missing in model-00001/,
    ],
  ])('is rejected: %s', async (_, edit, fault) => {
    const folder = await sharded(edit)
    const error = await openCheckpoint(folder).then(
      () => undefined,
      (e: Error) => e,
    )
    expect(error?.message).toMatch(fault)
    expect(error?.message).toContain(folder)
  })

  it('is rejected if two shards contain the same tensor', async () => {
    const folder = await sharded(index => {
      Object.assign(index.weight_map, { a: shard(1) })
    })
    await writeFile(join(folder, shard(1)), rawFile({ a: { dtype: 'U8', shape: [0], data_offsets: [0, 0] } }, 0))
    const index = { weight_map: { a: shard(1), 'lm_head.weight': 'b.safetensors' } }
    await writeFile(join(folder, INDEX), JSON.stringify(index))
    const two = {
      'lm_head.weight': { dtype: 'U8', shape: [0], data_offsets: [0, 0] },
      a: { dtype: 'U8', shape: [0], data_offsets: [0, 0] },
    }
    await writeFile(join(folder, 'b.safetensors'), rawFile(two, 0))
    await expect(openCheckpoint(folder)).rejects.toThrow(
      /b.safetensors: contains tensor "a", but the index assigns it to model-00001/,
    )
  })

  it('is rejected if it is not JSON, names a tensor twice or is null', async () => {
    const folder = await sharded()
    await writeFile(join(folder, INDEX), '{')
    await expect(openCheckpoint(folder)).rejects.toThrow(/the index is invalid/)
    await writeFile(join(folder, INDEX), `{"weight_map":{"a":"x","a":"y"}}`)
    await expect(openCheckpoint(folder)).rejects.toThrow(/duplicate key "a"/)
    await writeFile(join(folder, INDEX), 'null')
    await expect(openCheckpoint(folder)).rejects.toThrow(/no "weight_map" object/)
  })
})

describe.skipIf(process.platform === 'win32' /* creating links needs a privilege */)('links', () => {
  it('to files outside the folder are rejected, for shards, indexes and single files', async () => {
    const folder = await sharded()
    const outside = join(folder, '..', 'elsewhere')
    await mkdir(outside)
    await rename(join(folder, shard(2)), join(outside, 'secret'))
    await symlink('../elsewhere/secret', join(folder, shard(2)))
    await expect(openCheckpoint(folder)).rejects.toThrow(
      /model-00002-of-00003.safetensors: it is a link to .*secret, outside of/,
    )

    await rename(join(folder, INDEX), join(outside, INDEX))
    await symlink(join(outside, INDEX), join(folder, INDEX))
    await expect(openCheckpoint(folder)).rejects.toThrow(/index.json: it is a link to/)

    await symlink(fixture('dtypes.safetensors'), join(folder, 'model.safetensors'))
    await expect(openCheckpoint(folder)).rejects.toThrow(/model.safetensors: it is a link to/)
  })

  it('to a sibling folder whose name starts with that of the checkpoint are rejected', async () => {
    const folder = await sharded()
    await mkdir(`${folder}-other`)
    await rename(join(folder, shard(1)), join(`${folder}-other`, 'x'))
    await symlink(join(`${folder}-other`, 'x'), join(folder, shard(1)))
    await expect(openCheckpoint(folder)).rejects.toThrow(/is a link to/)
  })

  it('to files in the folder, or in the given root, are followed', async () => {
    const folder = await sharded()
    await rename(join(folder, shard(1)), join(folder, 'blob'))
    await symlink('blob', join(folder, shard(1)))
    await (await openCheckpoint(folder)).close()

    const blobs = join(folder, '..', 'blobs')
    await mkdir(blobs)
    await rename(join(folder, shard(2)), join(blobs, 'abc'))
    await symlink('../blobs/abc', join(folder, shard(2)))
    await expect(openCheckpoint(folder)).rejects.toThrow(/pass \{ root \}/)
    await using checkpoint = await openCheckpoint(folder, { root: join(folder, '..') })
    expect((await checkpoint.read('model.layers.0.mlp.up_proj.weight')).shape).toEqual([8, 4])

    // A single file may be a link to anywhere, unless there is a root.
    await (await openCheckpoint(join(folder, shard(2)))).close()
    await (await openCheckpoint(join(folder, shard(2)), { root: blobs })).close()
    await expect(openCheckpoint(join(folder, shard(2)), { root: folder })).rejects.toThrow(/it is a link to/)
  })

  it('to the checkpoint folder itself are followed', async () => {
    const folder = await sharded()
    const link = join(folder, '..', 'latest')
    await symlink(folder, link)
    const checkpoint = await openCheckpoint(link)
    expect(checkpoint.keys()).toHaveLength(4)
    await checkpoint.close()
    expect(await openFiles(folder)).toEqual([])
  })
})

describe('a folder', () => {
  it('without a checkpoint, and a missing folder, are reported', async () => {
    const folder = await temporaryFolder()
    await expect(openCheckpoint(folder)).rejects.toThrow(`${folder}: the folder has neither model.safetensors nor`)
    await rm(folder, { recursive: true })
    await expect(openCheckpoint(folder)).rejects.toThrow(`${folder}: opening failed: no such file or folder`)
  })

  it('with model.safetensors opens like the file itself', async () => {
    const folder = await temporaryFolder()
    await copyFile(fixture('dtypes.safetensors'), join(folder, 'model.safetensors'))
    for (const path of [folder, join(folder, 'model.safetensors')]) {
      await using checkpoint = await openCheckpoint(path)
      expect((await checkpoint.read('scalar')).data).toEqual(Float32Array.of(7.5))
    }
  })
})
