import { readFile, rename, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, describe, expect, it, vi } from 'vitest'
import { readSafetensors } from './read-safetensors.ts'
import { renameWithRetry } from './rename-with-retry.ts'
import { temporaryFolder } from './test-files.ts'
import { writeSafetensors } from './write-safetensors.ts'

vi.mock('node:fs/promises', { spy: true })
afterEach(() => vi.mocked(rename).mockReset())

/** Makes the next renames fail, as on Windows while another program has the file open. */
function failNextRenames(times: number, code: string): void {
  const error = Object.assign(new Error(`${code}: rename`), { code })
  for (let i = 0; i < times; i++) vi.mocked(rename).mockRejectedValueOnce(error)
}

describe('renameWithRetry', () => {
  it.each(['EPERM', 'EACCES', 'EBUSY'])('retries after %s', async code => {
    const folder = await temporaryFolder()
    await writeFile(join(folder, 'new'), 'new')
    await writeFile(join(folder, 'old'), 'old')
    failNextRenames(3, code)
    await renameWithRetry(join(folder, 'new'), join(folder, 'old'))
    expect(await readFile(join(folder, 'old'), 'utf8')).toBe('new')
  })

  it('gives up after six attempts, and after one on other errors', async () => {
    failNextRenames(9, 'EPERM')
    await expect(renameWithRetry('a', 'b')).rejects.toThrow('EPERM')
    expect(rename).toHaveBeenCalledTimes(6)
    vi.mocked(rename).mockReset()
    await expect(renameWithRetry('missing', 'b')).rejects.toThrow('ENOENT')
    expect(rename).toHaveBeenCalledTimes(1)
  })

  it('is used by writeSafetensors', async () => {
    const path = join(await temporaryFolder(), 'one.safetensors')
    failNextRenames(2, 'EBUSY')
    await writeSafetensors(path, [{ name: 'a', dtype: 'u8', shape: [1], data: Uint8Array.of(7) }])
    await using file = await readSafetensors(path)
    expect((await file.read('a')).data).toEqual(Uint8Array.of(7))
  })
})
