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

test('file URLs are accepted as paths', async () => {
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

describe('an invalid location is rejected:', () => {
  const none = undefined as unknown as string
  it.each([
    ['openCheckpoint', () => openCheckpoint(none)],
    ['readSafetensors', () => readSafetensors(none)],
    ['writeSafetensors', () => writeSafetensors(none, entries)],
    ['saveCheckpoint', () => saveCheckpoint(none, entries)],
    ['readGguf', () => readGguf(none)],
    ['writeGguf', () => writeGguf(none, { metadata: {}, tensors: [] })],
  ])('undefined for %s', async (op, call) => {
    await expect(call()).rejects.toMatchObject({ code: 'E_ATTR', op, message: expect.stringContaining('undefined') })
  })

  it.each(['https://example.org/model', new URL('http://example.org/model')])('%s for saving', async address => {
    const rejection = { code: 'E_ATTR', message: expect.stringContaining('example.org/model') }
    await expect(saveCheckpoint(address, entries)).rejects.toMatchObject(rejection)
    await expect(writeSafetensors(address, entries)).rejects.toMatchObject(rejection)
  })

  it('a URL of an unsupported protocol', async () => {
    await expect(openCheckpoint(new URL('ftp://example.org/model'))).rejects.toMatchObject({ code: 'E_ATTR' })
  })

  it('a URL with a password, which the message does not contain', async () => {
    const error = await openCheckpoint('https://me:secret@example.org/model').catch((e: Error) => e)
    expect(error).toMatchObject({ code: 'E_ATTR', message: expect.stringContaining('example.org') })
    expect((error as Error).message).not.toContain('secret')
  })

  it('a web address or a list of files with the option root', async () => {
    for (const location of ['https://example.org/model', []])
      await expect(openCheckpoint(location, { root: 'models' })).rejects.toMatchObject({ code: 'E_ATTR' })
  })
})
