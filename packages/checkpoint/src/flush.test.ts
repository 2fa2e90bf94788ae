import { open, readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, it, vi } from 'vitest'
import { flushFile, flushFolder } from './flush.ts'
import { readSafetensors } from './read-safetensors.ts'
import { saveCheckpoint } from './save-checkpoint.ts'
import { temporaryFolder } from './test-files.ts'
import { writeSafetensors } from './write-safetensors.ts'

it('flushes an open file, and rejects for any other descriptor', async () => {
  const file = await open(join(await temporaryFolder(), 'file'), 'w')
  await expect(flushFile(file)).resolves.toBeUndefined()
  await file.close()
  await expect(flushFile({ fd: 2 ** 30 })).rejects.toThrow('EBADF')
})

it('ignores folders that cannot be flushed', async () => {
  await expect(flushFolder(join(await temporaryFolder(), 'missing'))).resolves.toBeUndefined()
})

it("files are written without FileHandle.sync, which Yarn's Plug'n'Play does not implement", async () => {
  const path = join(await temporaryFolder(), 'one.safetensors')
  const other = await open(`${path}.other`, 'w')
  const sync = vi.spyOn(Object.getPrototypeOf(other), 'sync').mockImplementation(() => {
    throw new Error('Method not implemented.')
  })
  try {
    await writeSafetensors(path, [{ name: 'a', dtype: 'u8', shape: [1], data: Uint8Array.of(7) }])
  } finally {
    sync.mockRestore()
    await other.close()
  }
  await using file = await readSafetensors(path)
  expect((await file.read('a')).data).toEqual(Uint8Array.of(7))
})

vi.mock('./flush.ts', { spy: true })

it('the folder is flushed after the last change to a checkpoint', async () => {
  const folder = await temporaryFolder()
  const entries = ['a', 'b'].map(name => ({ name, dtype: 'u8' as const, shape: [1], data: Uint8Array.of(7) }))
  const flushed: string[][] = []
  vi.mocked(flushFolder).mockImplementation(async path => void flushed.push(await readdir(path)))
  // From one file to shards, back, and to other shards.
  for (const maxShardBytes of [2, 1, 2, 1, 1]) {
    await saveCheckpoint(folder, entries, { maxShardBytes })
    expect(flushed.at(-1)).toEqual(await readdir(folder))
  }
})
