import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { Worker } from 'node:worker_threads'
import { build } from 'esbuild'
import { describe, expect, test } from 'vitest'
import { EncodePool } from './pool.ts'

describe('worker threads of encodeBatch', () => {
  test('a bundle of the package encodes without them', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'moe-bundle-'))
    try {
      const outfile = join(folder, 'bundle.mjs')
      const entry = fileURLToPath(new URL('../index.ts', import.meta.url))
      await build({ entryPoints: [entry], bundle: true, platform: 'node', format: 'esm', outfile, logLevel: 'error' })
      const { trainBpe } = await import(/* @vite-ignore */ pathToFileURL(outfile).href)
      const tokenizer = trainBpe(['a text of a few words'], { vocabSize: 260, preTokenizer: 'deepseek-v3' })
      const texts = ['a text', 'a few words']
      expect(await tokenizer.encodeBatch(texts, { threads: 2 })).toEqual(
        texts.map((text: string) => tokenizer.encode(text)),
      )
    } finally {
      rmSync(folder, { recursive: true })
    }
  })

  test('after one has failed, later batches are rejected, and do not wait for it', async () => {
    const worker = new Worker("require('node:worker_threads').parentPort.on('message', () => nothing())", {
      eval: true,
    })
    const pool = new EncodePool([worker])
    await expect(pool.encode(['a'], {})).rejects.toThrow('a worker thread failed: nothing is not defined')
    await expect(pool.encode(['b'], {})).rejects.toThrow('a worker thread failed: it ended in an earlier batch')
    expect(pool.failed).toBe(true)
  })
})
