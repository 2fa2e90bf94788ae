import { readdir, rename, rm, writeFile } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { afterEach, expect, test, vi } from 'vitest'
import { removeTemporaryFolders, temporaryFolder } from '../test-model.ts'
import { latestCheckpoint, publishCheckpoint, STATE_FILE } from './checkpoint-folder.ts'

vi.mock('node:fs/promises', { spy: true })
afterEach(async () => {
  vi.mocked(rename).mockReset()
  vi.mocked(rm).mockReset()
  await removeTemporaryFolders()
})

/** The error of Windows for a file that another program has open. */
const openFile = (code: string) => Object.assign(new Error(`${code}: the file is open`), { code })

async function folderOfRun() {
  const out = await temporaryFolder()
  const save = (step: number) =>
    publishCheckpoint(out, step, 1, temporary => writeFile(join(temporary, STATE_FILE), `${step}`))
  return { out, save, names: async () => (await readdir(join(out, 'checkpoints'))).sort() }
}

test('a checkpoint is saved and `latest` updated even if files are briefly open in another program', async () => {
  const { out, save, names } = await folderOfRun()
  await save(1)
  vi.mocked(rename).mockRejectedValueOnce(openFile('EPERM')).mockRejectedValueOnce(openFile('EBUSY'))
  await save(2)
  expect(await names()).toEqual(['latest', 'step-000002'])
  expect(basename(latestCheckpoint(out)!)).toBe('step-000002')
})

test('an old checkpoint with open files stays intact until a later save', async () => {
  const { save, names } = await folderOfRun()
  const old = await save(1)
  const { rename: renameFile } = await vi.importActual<typeof import('node:fs/promises')>('node:fs/promises')
  vi.mocked(rename).mockImplementation((from, to) =>
    from === old ? Promise.reject(openFile('EPERM')) : renameFile(from, to),
  )
  await save(2)
  expect(await names()).toEqual(['latest', 'step-000001', 'step-000002'])
  vi.mocked(rename).mockReset()
  await save(3)
  expect(await names()).toEqual(['latest', 'step-000003'])
})

test('a checkpoint that cannot be removed is renamed, and a later save removes it', async () => {
  const { out, save, names } = await folderOfRun()
  await save(1)
  vi.mocked(rm).mockImplementation(async () => {
    throw openFile('ENOTEMPTY')
  })
  await save(2)
  expect((await names()).map(name => name.replace(/-\d+-\w+$/, ''))).toEqual([
    '.writing-step-000001',
    'latest',
    'step-000002',
  ])
  expect(basename(latestCheckpoint(out)!)).toBe('step-000002')
  vi.mocked(rm).mockReset()
  await save(3)
  expect(await names()).toEqual(['latest', 'step-000003'])
})
