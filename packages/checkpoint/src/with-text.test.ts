import { mkdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, it } from 'vitest'
import { saveCheckpointWithText } from './save-checkpoint.ts'
import { temporaryFolder } from './test-files.ts'
import { writeWithText } from './with-text.ts'
import type { TensorEntry } from './write-safetensors.ts'

const name = 'config.json'
const textIn = (folder: string) => readFile(join(folder, name), 'utf8').catch(() => null)

it('between the switch of the weights and the new text, there is no text', async () => {
  const folder = join(await temporaryFolder(), 'new')
  const save = (text: string, between: string | null) =>
    writeWithText('save', folder, { name, text }, async beforeSwitch => {
      const before = await textIn(folder)
      await beforeSwitch()
      expect(await textIn(folder)).toBe(between)
      return before
    })
  await mkdir(folder)
  expect(await save('a', null)).toBeNull()
  expect(await save('b', null)).toBe('a')
  // The same text describes both.
  expect(await save('b', 'b')).toBe('b')
  expect(await textIn(folder)).toBe('b')
})

it('a failure leaves the old text', async () => {
  const folder = await temporaryFolder()
  await writeFile(join(folder, name), 'a')
  for (const removed of [false, true]) {
    const saving = writeWithText('save', folder, { name, text: 'b' }, async beforeSwitch => {
      if (removed) await beforeSwitch()
      throw new Error('stop')
    })
    await expect(saving).rejects.toThrow('stop')
    expect(await textIn(folder)).toBe('a')
  }
})

it.each([1e9, 16])('the old text stays until all tensors are written, in shards of %d bytes', async maxShardBytes => {
  const folder = await temporaryFolder()
  await writeFile(join(folder, name), 'a')
  const seen: Array<string | null> = []
  const entries = [1, 2].map(
    (value): TensorEntry => ({
      name: `${value}`,
      dtype: 'f32',
      shape: [4],
      data: async () => {
        seen.push(await textIn(folder))
        return new Float32Array(4).fill(value)
      },
    }),
  )
  // A folder in the place of the file cannot be replaced or removed.
  const single = join(folder, 'model.safetensors')
  await mkdir(join(single, 'full'), { recursive: true })
  const text = { name, text: 'b' }
  await expect(saveCheckpointWithText(folder, entries, { maxShardBytes }, text)).rejects.toMatchObject({
    code: 'E_CHECKPOINT',
  })
  expect([...seen, await textIn(folder)]).toEqual(['a', 'a', 'a'])
  await rm(single, { recursive: true })
  await saveCheckpointWithText(folder, entries, { maxShardBytes }, text)
  expect(await textIn(folder)).toBe('b')
})
