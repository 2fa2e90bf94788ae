import { appendFile, mkdir, rename, rm, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterEach, expect, test } from 'vitest'
import { removeTemporaryFolders, temporaryFolder } from '../test-model.ts'
import { TailedFile } from './tailed-file.ts'

afterEach(removeTemporaryFolders)

async function tailed() {
  const path = join(await temporaryFolder(), 'log.jsonl')
  const file = new TailedFile(path)
  /** The lines since the last call, with `reset` where reading restarted at the beginning. */
  const read = async () => {
    const lines: string[] = []
    while (
      await file.read(
        line => lines.push(line),
        () => lines.push('reset'),
      )
    );
    return lines
  }
  return { path, file, read }
}

test('a partial line is read once it is complete, wherever it was split', async () => {
  const { path, read } = await tailed()
  await fc.assert(
    fc.asyncProperty(fc.array(fc.string({ unit: 'grapheme' })), fc.array(fc.nat(200)), async (texts, cuts) => {
      await rm(path, { force: true })
      await read()
      const lines = texts.map(text => text.replaceAll('\n', ' ')).filter(text => text !== '')
      const bytes = Buffer.from(lines.map(line => `${line}\n`).join(''))
      const got: string[] = []
      let at = 0
      for (const length of [...cuts, bytes.length]) {
        await appendFile(path, bytes.subarray(at, at + length))
        at += length
        got.push(...(await read()))
      }
      expect(got).toEqual(lines)
    }),
    { numRuns: 50 },
  )
})

test('a file may not exist yet, may be removed, and may be created again', async () => {
  const { path, file, read } = await tailed()
  expect(await read()).toEqual([])
  expect(file.changed).toBe(0)
  await writeFile(path, 'a\nb\n')
  expect(await read()).toEqual(['a', 'b'])
  expect(file.changed).toBeGreaterThan(0)
  await rm(path)
  expect(await read()).toEqual(['reset'])
  expect(await read()).toEqual([])
  expect(file.changed).toBe(0)
  await writeFile(path, 'c\n')
  expect(await read()).toEqual(['c'])
  expect(file.problem).toBeUndefined()
})

test('a replaced file is read from the beginning, even if it is longer', async () => {
  const { path, read } = await tailed()
  await writeFile(path, 'a\nb\nhalf')
  expect(await read()).toEqual(['a', 'b'])
  await writeFile(`${path}.tmp`, 'a\nsecond\nthird\nfourth\n')
  await rename(`${path}.tmp`, path)
  expect(await read()).toEqual(['reset', 'a', 'second', 'third', 'fourth'])
})

test('a truncated file is read from the beginning', async () => {
  const { path, read } = await tailed()
  await writeFile(path, 'a\nb\nc\n')
  await read()
  await truncate(path, 2)
  expect(await read()).toEqual(['reset', 'a'])
})

test('a line of several megabytes is skipped', async () => {
  const { path, read } = await tailed()
  await writeFile(path, 'a\n')
  for (let i = 0; i < 5; i++) await appendFile(path, Buffer.alloc(1 << 20, 120))
  expect(await read()).toEqual(['a'])
  await appendFile(path, 'tail\nb\n')
  expect(await read()).toEqual(['b'])
})

test('many lines are read in portions', async () => {
  const { path, file } = await tailed()
  const line = 'x'.repeat(99)
  for (let i = 0; i < 4; i++) await appendFile(path, `${line}\n`.repeat(100_000))
  let count = 0
  const countsByCall: number[] = []
  for (let more = true; more; countsByCall.push(count)) {
    more = await file.read(
      text => {
        if (text === line) count++
      },
      () => expect.fail('reading restarted'),
    )
  }
  expect(count).toBe(400_000)
  expect(countsByCall.length).toBeGreaterThan(1)
})

test('an unreadable file is reported', async () => {
  const { path, file, read } = await tailed()
  await mkdir(path)
  expect(await read()).toEqual([])
  expect(file.problem).toMatch(/EISDIR|EPERM|EACCES/)
})
