import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { describe, expect, it, test } from 'vitest'
import { readGguf } from './gguf/read-gguf.ts'
import { writeGguf } from './gguf/write-gguf.ts'
import { openCheckpoint } from './open-checkpoint.ts'
import { readSafetensors } from './read-safetensors.ts'
import { saveCheckpoint } from './save-checkpoint.ts'
import { temporaryFolder } from './test-files.ts'
import { writeSafetensors } from './write-safetensors.ts'

const entries = [{ name: 'a', dtype: 'u8', shape: [1], data: Uint8Array.of(7) }] as const

test('file URLs are paths', async () => {
  const folder = join(await temporaryFolder(), 'ä model')
  await saveCheckpoint(pathToFileURL(folder), entries)
  await writeSafetensors(pathToFileURL(join(folder, 'other.safetensors')), entries)
  for (const source of [
    await openCheckpoint(pathToFileURL(folder)),
    await readSafetensors(pathToFileURL(join(folder, 'other.safetensors'))),
  ]) {
    expect((await source.read('a')).data).toEqual(Uint8Array.of(7))
    await source.close()
  }
})

describe('what is no path is refused', () => {
  const none = undefined as unknown as string
  it.each([
    ['openCheckpoint', () => openCheckpoint(none)],
    ['readSafetensors', () => readSafetensors(none)],
    ['writeSafetensors', () => writeSafetensors(none, entries)],
    ['saveCheckpoint', () => saveCheckpoint(none, entries)],
    ['readGguf', () => readGguf(none)],
    ['writeGguf', () => writeGguf(none, { metadata: {}, tensors: [] })],
  ])('%s', async (op, call) => {
    await expect(call()).rejects.toMatchObject({ code: 'E_ATTR', op, message: expect.stringContaining('undefined') })
  })

  it('a URL of the web', async () => {
    await expect(openCheckpoint(new URL('https://example.org/model'))).rejects.toMatchObject({ code: 'E_ATTR' })
  })
})
