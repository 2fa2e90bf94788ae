import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import type { Worker } from 'node:worker_threads'
import { build } from 'esbuild'
import { beforeEach, describe, expect, test } from 'vitest'
import { type BpeTokenizer, trainBpe } from '../index.ts'

/** Workers that a test has started, and those that have received a request. */
const started: Worker[] = []
const used = new Set<Worker>()
process.on('worker', worker => {
  started.push(worker)
  const post = worker.postMessage.bind(worker)
  worker.postMessage = (...request: Parameters<Worker['postMessage']>) => {
    used.add(worker)
    post(...request)
  }
})
beforeEach(() => {
  started.length = 0
})

const tokenizer = () => trainBpe(['a text of a few words'], { vocabSize: 260, preTokenizer: 'deepseek-v3' })
/** Returns a text larger than a request, so that each text is sent separately. */
const long = (word: string) => `${word} `.repeat(Math.ceil(2 ** 20 / (word.length + 1)))

/** Checks that `own.encode` gives the same ids; faster than `toEqual`. */
function expectSame(ids: readonly Uint32Array[], own: BpeTokenizer, texts: readonly string[]): void {
  texts.forEach((text, i) => {
    const expected = own.encode(text)
    expect(ids[i]).toHaveLength(expected.length)
    expect(ids[i].every((id, at) => id === expected[at])).toBe(true)
  })
}

describe('worker threads of encodeBatch', () => {
  test.each(['esm', 'cjs'] as const)('a bundle (%s) encodes without them, and ignores worker.js', async format => {
    const folder = mkdtempSync(join(tmpdir(), 'moe-bundle-'))
    try {
      const name = format === 'esm' ? 'bundle.mjs' : 'bundle.cjs'
      const outfile = join(folder, name)
      const entry = fileURLToPath(new URL('../index.ts', import.meta.url))
      await build({ entryPoints: [entry], bundle: true, platform: 'node', format, outfile, logLevel: 'silent' })
      const mark = JSON.stringify(join(folder, 'started'))
      writeFileSync(join(folder, 'worker.js'), `require('node:fs').writeFileSync(${mark}, '')`)
      const { trainBpe: train } = (await import(
        /* @vite-ignore */ pathToFileURL(outfile).href
      )) as typeof import('../index.ts')
      const bundled = train(['a text of a few words'], { vocabSize: 260, preTokenizer: 'deepseek-v3' })
      const texts = ['a text', 'a few words']
      for (let batch = 0; batch < 2; batch++) {
        expect(await bundled.encodeBatch(texts, { threads: 2 })).toEqual(texts.map(text => bundled.encode(text)))
      }
      expect(readdirSync(folder).sort()).toEqual([name, 'worker.js'])
    } finally {
      rmSync(folder, { recursive: true })
    }
  })

  test('each batch uses as many threads as it asks for', async () => {
    const own = tokenizer()
    const texts = ['a', 'few', 'words', 'of', 'a text'].map(long)
    const threadsFor = async (threads: number) => {
      used.clear()
      const ids = await own.encodeBatch(texts, { threads })
      expectSame(ids, own, texts)
      return used.size
    }
    expect(await threadsFor(1)).toBe(0)
    expect(await threadsFor(2)).toBe(2)
    expect(await threadsFor(4)).toBe(4)
    expect(await threadsFor(3)).toBe(3)
    expect(started).toHaveLength(4)
  })

  test('a worker that fails is replaced in the next batch', async () => {
    const own = tokenizer()
    const texts = ['a text', 'words']
    await own.encodeBatch(texts, { threads: 2 })
    const batch = own.encodeBatch([long('a'), long('b')], { threads: 2 })
    const later = own.encodeBatch(texts, { threads: 2 })
    await started[0].terminate()
    await expect(batch).rejects.toThrow('encodeBatch: a worker thread failed: it ended with exit code 1')
    expect(await later).toEqual(texts.map(text => own.encode(text)))
    expect(started).toHaveLength(3)
  })

  test('a text that cannot be encoded does not disturb the next batch', async () => {
    const own = trainBpe(['a b'], { vocabSize: 257, preTokenizer: { patterns: ['(?=\\s*b)c'] } })
    const endless = `${' '.repeat(200_000)}b`
    const batch = own.encodeBatch([endless, long('a').repeat(4), long('a').repeat(4)], { threads: 2 })
    const texts = [long('a'), long('b')]
    const later = own.encodeBatch(texts, { threads: 2 })
    await expect(batch).rejects.toThrow('takes more than')
    expectSame(await later, own, texts)
  })
})
