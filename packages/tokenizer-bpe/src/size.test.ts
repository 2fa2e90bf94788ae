/** @file What an application's bundle grows by: the published build, bundled and minified by Vite as for a browser, gzipped. */
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
  // Inside the package, whose `sideEffects` then hold for it.
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

/** Gzipped bytes that load with the page, and those that only load when asked for, by the name of their file. */
async function bundle(code: string): Promise<{ first: number; later: Map<string, number> }> {
  writeFileSync(join(folder, 'main.js'), code)
  const result = (await build({
    root: folder,
    configFile: false,
    logLevel: 'error',
    build: { write: false, modulePreload: { polyfill: false }, rollupOptions: { input: join(folder, 'main.js') } },
  })) as Rolldown.RolldownOutput
  let first = 0
  const later = new Map<string, number>()
  for (const output of result.output) {
    if (output.type !== 'chunk') continue
    const bytes = gzipSync(output.code, { level: 9 }).length
    if (output.isEntry) first += bytes
    else later.set(output.name.replace(/-[A-Z0-9]{8}$/, ''), bytes)
  }
  return { first, later }
}

test('encoding and decoding in a browser leaves training and general pre-tokenizers out', async () => {
  const { first, later } = await bundle(
    `import { BpeTokenizer } from './dist/browser.js'\nglobalThis.tokenizer = BpeTokenizer`,
  )
  expect(first).toBeLessThan(20_800)
  expect(first).toBeGreaterThan(10_000)
  expect([...later.keys()].sort()).toEqual(['pool', 'pre-tokenizer-steps'])
  expect(later.get('pre-tokenizer-steps')).toBeGreaterThan(5_000)
}, 60_000)

test('everything, training included', async () => {
  const { first } = await bundle(`import * as all from './dist/browser.js'\nglobalThis.all = all`)
  expect(first).toBeLessThan(30_800)
}, 60_000)
