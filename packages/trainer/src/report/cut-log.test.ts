import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, expect, test } from 'vitest'
import { removeTemporaryFolders, temporaryFolder } from '../test-model.ts'
import { cutLog } from './cut-log.ts'
import { LineSplitter } from './line-splitter.ts'

afterEach(removeTemporaryFolders)

test('a log is truncated after a step and after the last complete line, and its lines are returned', async () => {
  const path = join(await temporaryFolder(), 'loads.jsonl')
  const line = (step: number) => `{"step":${step},"steps":1,"layers":[{"name":"a","load":[${step}]}]}\n`
  const lines = [1, 2, 3].map(line).join('')
  for (const [text, upTo, left] of [
    [lines, 2, [1, 2]],
    [lines, 3, [1, 2, 3]],
    [lines, 0, []],
    [`${line(1)}nonsense\n${line(2)}`, 9, [1]],
    [`${line(1)}null\n${line(2)}`, 9, [1]],
    [`${line(1)}{}\n${line(2)}`, 9, [1]],
    [`${line(1)}${line(2).slice(0, 9)}`, 9, [1]],
    ['', 9, []],
  ] as const) {
    await writeFile(path, text)
    const kept: unknown[] = []
    await cutLog(path, upTo, line => kept.push(line))
    expect(await readFile(path, 'utf8')).toBe(left.map(line).join(''))
    expect(kept).toEqual(left.map(step => JSON.parse(line(step))))
  }
})

test('lines and their places are the same for pieces of any size', () => {
  const bytes = Buffer.from('\na\n\nbü\n\n\nc\nrest')
  for (let size = 1; size <= bytes.length; size++) {
    const splitter = new LineSplitter()
    const lines: unknown[] = []
    for (let at = 0; at < bytes.length; at += size)
      splitter.take(bytes.subarray(at, at + size), (...line) => lines.push(line))
    expect(lines).toEqual([
      ['a', 1, 3],
      ['bü', 4, 8],
      ['c', 10, 12],
    ])
    expect(splitter.offset).toBe(bytes.length)
  }
})

test('a missing log is not created, and errors name the file', async () => {
  const path = join(await temporaryFolder(), 'metrics.jsonl')
  await cutLog(path, 1)
  await expect(readFile(path)).rejects.toThrow('ENOENT')
  await writeFile(path, '')
  await mkdir(`${path}.tmp`)
  await expect(cutLog(path, 1)).rejects.toMatchObject({ code: 'E_CHECKPOINT', op: path })
})
