import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, readdirSync, readFileSync, unlinkSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { hostname } from 'node:os'
import { join } from 'node:path'
import { afterEach, expect, test, vi } from 'vitest'
import { removeTemporaryFolders, temporaryFolder } from '../test-model.ts'
import { lockFolder } from './folder-lock.ts'

vi.mock('node:fs', { spy: true })
afterEach(removeTemporaryFolders)

test('a folder can be locked once, and again after unlocking', async () => {
  const out = join(await temporaryFolder(), 'new', 'run')
  const unlock = lockFolder(out)
  expect(() => lockFolder(`${out}/../run`)).toThrow(new RegExp(`process ${process.pid} is writing to`))
  unlock()
  expect(existsSync(join(out, 'training.lock'))).toBe(false)
  lockFolder(out)()
})

test.each([
  ['a process that was killed', `${spawnSync(process.execPath, ['-e', '']).pid} ${hostname()}`],
  ['an earlier process with the id of this one', `${process.pid} ${hostname()}`],
  ['another machine', `${process.ppid} elsewhere.example`],
  ['a process that was killed while writing it', ''],
])('the lock of %s is ignored', async (_, text) => {
  const out = await temporaryFolder()
  await writeFile(join(out, 'training.lock'), text)
  lockFolder(out)()
})

test.runIf(process.platform === 'linux')('the lock of a zombie process is ignored', async () => {
  const out = await temporaryFolder()
  const parent = spawn('sh', ['-c', 'sleep 0 & echo $!; exec sleep 60'])
  try {
    const pid = Number((await once(parent.stdout, 'data')).toString())
    await vi.waitFor(() => expect(readFileSync(`/proc/${pid}/status`, 'utf8')).toMatch(/^State:\s*Z/m))
    await writeFile(join(out, 'training.lock'), `${pid} ${hostname()}\n`)
    lockFolder(out)()
  } finally {
    parent.kill()
  }
})

test('the lock of a running process is respected', async () => {
  const out = await temporaryFolder()
  await writeFile(join(out, 'training.lock'), `${process.ppid} ${hostname()}\n`)
  expect(() => lockFolder(out)).toThrow(new RegExp(`process ${process.ppid} is writing to .*remove .*training.lock`))
})

test('a stale lock that another process replaces at the same time is respected', async () => {
  const out = await temporaryFolder()
  const path = join(out, 'training.lock')
  const running = `${process.ppid} ${hostname()}\n`
  await writeFile(path, running)
  vi.mocked(readFileSync).mockReturnValueOnce(`${process.ppid} elsewhere.example\n`)
  expect(() => lockFolder(out)).toThrow(/another process is starting in/)
  expect(readFileSync(path, 'utf8')).toBe(running)
  expect(readdirSync(out)).toEqual(['training.lock'])
})

test('a lock whose process is about to write it is respected', async () => {
  const out = await temporaryFolder()
  await writeFile(join(out, 'training.lock'), `${process.ppid} ${hostname()}\n`)
  vi.mocked(readFileSync).mockReturnValueOnce('')
  expect(() => lockFolder(out)).toThrow(new RegExp(`process ${process.ppid} is writing to`))
})

test('the error for a read-only file system has EROFS, although Node reports ENOENT', async () => {
  const out = join(await temporaryFolder(), 'new', 'run')
  const fails = (code: string) => () => {
    throw Object.assign(new Error(`${code}: mkdir`), { code })
  }
  vi.mocked(mkdirSync).mockImplementationOnce(fails('ENOENT')).mockImplementationOnce(fails('EROFS'))
  expect(() => lockFolder(out)).toThrow(/cannot be used: EROFS/)
  expect(vi.mocked(mkdirSync)).toHaveBeenLastCalledWith(join(out, '..'))
})

test('unlocking a folder that has become read-only is not an error', async () => {
  const out = await temporaryFolder()
  const unlock = lockFolder(out)
  vi.mocked(unlinkSync).mockImplementationOnce(() => {
    throw Object.assign(new Error('EROFS: unlink'), { code: 'EROFS' })
  })
  unlock()
  expect(existsSync(join(out, 'training.lock'))).toBe(true)
  lockFolder(out)()
})

test('a folder that cannot be created is an error', async () => {
  const path = join(await temporaryFolder(), 'file')
  await writeFile(path, '')
  for (const out of [path, join(path, 'below')]) {
    expect(() => lockFolder(out)).toThrow(expect.objectContaining({ code: 'E_CONFIG' }))
  }
})
