/** @file Bundle size: the published build, bundled and minified by Vite for a browser, gzipped. */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { gzipSync } from 'node:zlib'
import { build, type Rolldown } from 'vite'
import { afterAll, beforeAll, expect, test } from 'vitest'

const root = fileURLToPath(new URL('..', import.meta.url))
const workspace = fileURLToPath(new URL('../../..', import.meta.url))
let folder: string

beforeAll(() => {
  // Inside the package, so that its `sideEffects` apply.
  folder = mkdtempSync(join(root, '.size-'))
  execFileSync(
    process.execPath,
    [
      join(workspace, 'node_modules/tsup/dist/cli-default.js'),
      '--no-dts',
      '--no-clean',
      '--out-dir',
      join(folder, 'dist'),
    ],
    { cwd: root, stdio: 'ignore' },
  )
}, 120_000)

afterAll(() => rmSync(folder, { recursive: true }))

interface Bundle {
  /** Gzipped bytes that are loaded with the page. */
  readonly first: number
  /** Additional gzipped bytes of these chunks and everything they import. */
  added(...names: readonly string[]): number
  /** Names of the chunks that are loaded on demand. */
  readonly later: readonly string[]
}

async function bundle(code: string): Promise<Bundle> {
  writeFileSync(join(folder, 'main.js'), code)
  const result = (await build({
    root: folder,
    configFile: false,
    logLevel: 'error',
    build: { write: false, modulePreload: { polyfill: false }, rollupOptions: { input: join(folder, 'main.js') } },
  })) as Rolldown.RolldownOutput
  const chunks = new Map(result.output.flatMap(output => (output.type === 'chunk' ? [[output.fileName, output]] : [])))
  const size = (files: Iterable<string>) =>
    [...files].reduce((sum, file) => sum + gzipSync(chunks.get(file)!.code, { level: 9 }).length, 0)
  const closure = (files: Iterable<string>) => {
    const all = new Set(files)
    for (const file of all) for (const needed of chunks.get(file)!.imports) all.add(needed)
    return all
  }
  const entry = closure([...chunks.values()].filter(chunk => chunk.isEntry).map(chunk => chunk.fileName))
  const later = new Map(
    [...chunks.values()].filter(chunk => chunk.isDynamicEntry).map(chunk => [chunk.name, chunk.fileName]),
  )
  return {
    first: size(entry),
    added: (...names) => size([...closure(names.map(name => later.get(name)!))].filter(file => !entry.has(file))),
    later: [...later.keys()].sort(),
  }
}

test('a page that encodes and decodes loads only the chunks that its tokenizer file needs', async () => {
  const { first, added, later } = await bundle(
    `import { BpeTokenizer } from './dist/browser.js'\nglobalThis.tokenizer = BpeTokenizer`,
  )
  expect(later).toEqual([
    'cl100k',
    'deepseek-llm',
    'deepseek-v3',
    'encode-stream',
    'gpt2',
    'normalizer',
    'o200k',
    'pinned-classes',
    'pool',
    'pre-tokenizer-steps',
    'template',
    'tiktoken',
    'token-lookup',
  ])
  expect(first).toBeGreaterThan(10_000)
  // The tokenizer.json of DeepSeek-V3.
  expect(first + added('deepseek-v3')).toBeLessThan(15_000)
  // Those of Llama 3 and Qwen 3.
  expect(first + added('cl100k', 'token-lookup', 'template')).toBeLessThan(16_050)
  expect(first + added('cl100k', 'normalizer')).toBeLessThan(16_050)
}, 60_000)

test('a bundle of everything, including training, stays small', async () => {
  const { first } = await bundle(`import * as all from './dist/browser.js'\nglobalThis.all = all`)
  expect(first).toBeLessThan(33_250)
}, 60_000)
