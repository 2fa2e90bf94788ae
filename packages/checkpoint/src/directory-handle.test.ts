import { expect, test } from 'vitest'
import { TestDirectory } from '../../../scripts/test-directory.ts'
import { openCheckpoint } from './open-checkpoint.ts'
import { saveCheckpoint } from './save-checkpoint.ts'
import { writeSafetensors } from './write-safetensors.ts'

const entry = (name: string, numbers: number[]) => ({
  name,
  dtype: 'f32' as const,
  shape: [numbers.length],
  data: Float32Array.from(numbers),
})

async function contents(folder: TestDirectory): Promise<Record<string, number[]>> {
  await using checkpoint = await openCheckpoint(folder)
  const read = async (key: string) => [key, Array.from((await checkpoint.read(key)).data as Float32Array)]
  return Object.fromEntries(await Promise.all(checkpoint.keys().map(read)))
}

test('a checkpoint is saved to a directory handle and opened from it', async () => {
  const folder = new TestDirectory('model')
  const saved = await saveCheckpoint(folder, [entry('a', [1, 2]), entry('b', [3])])
  expect(saved.files).toEqual(['model.safetensors'])
  expect(await contents(folder)).toEqual({ a: [1, 2], b: [3] })
})

test('saving replaces a single file with shards and vice versa, and removes all files of the earlier checkpoint', async () => {
  const folder = new TestDirectory('model')
  await saveCheckpoint(folder, [entry('a', [1]), entry('b', [2])])
  const sharded = await saveCheckpoint(folder, [entry('a', [3]), entry('b', [4])], { maxShardBytes: 4 })
  expect(sharded.files).toHaveLength(3)
  expect([...folder.entries.keys()].sort()).toEqual([...sharded.files].sort())
  expect(await contents(folder)).toEqual({ a: [3], b: [4] })
  await saveCheckpoint(folder, [entry('a', [5])])
  expect([...folder.entries.keys()]).toEqual(['model.safetensors'])
  expect(await contents(folder)).toEqual({ a: [5] })
})

test('saving to full storage fails, keeps the earlier checkpoint and leaves no partial file', async () => {
  const folder = new TestDirectory('model')
  await expect(saveCheckpoint(folder, [entry('big', new Array(600_000).fill(1))])).resolves.toBeDefined()
  folder.quota.bytes = 1_500_000
  await expect(saveCheckpoint(folder, [entry('big', new Array(600_000).fill(2))])).rejects.toMatchObject({
    code: 'E_CHECKPOINT',
    op: 'model/model.safetensors',
    problem: expect.stringContaining('QuotaExceededError'),
  })
  expect((await contents(folder))['big'][0]).toBe(1)

  const fresh = new TestDirectory('fresh', { bytes: 10 })
  await expect(saveCheckpoint(fresh, [entry('a', [1])])).rejects.toMatchObject({ code: 'E_CHECKPOINT' })
  expect([...fresh.entries.keys()]).toEqual([])
})

test('an error thrown by the data function of an entry is not wrapped', async () => {
  const folder = new TestDirectory('model')
  for (const error of [new RangeError('of the caller'), new DOMException('aborted', 'AbortError')]) {
    const failing = { ...entry('a', [1]), data: () => Promise.reject(error) }
    await expect(saveCheckpoint(folder, [failing])).rejects.toBe(error)
  }
  expect([...folder.entries.keys()]).toEqual([])
})

test('errors name what is missing or is a folder; the option root is rejected', async () => {
  const folder = new TestDirectory('model')
  await expect(openCheckpoint(folder)).rejects.toMatchObject({ code: 'E_CHECKPOINT', op: 'model' })
  await folder.getDirectoryHandle('model.safetensors', { create: true })
  await expect(openCheckpoint(folder)).rejects.toMatchObject({ op: 'model/model.safetensors' })
  await expect(openCheckpoint(folder, { root: '/' })).rejects.toMatchObject({ code: 'E_ATTR' })
})

test('without Node, a path is rejected with the name of the called function', async () => {
  const versions = Object.getOwnPropertyDescriptor(process, 'versions') as PropertyDescriptor
  Object.defineProperty(process, 'versions', { value: {}, configurable: true })
  try {
    await expect(writeSafetensors('somewhere', [])).rejects.toMatchObject({
      code: 'E_UNSUPPORTED',
      op: 'writeSafetensors',
    })
  } finally {
    Object.defineProperty(process, 'versions', versions)
  }
})
