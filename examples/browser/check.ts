/**
 * @file Runs the code of examples/browser in headless Chromium, with and without WebGPU: opens a model by its URL and compares its greedy
 * text with that of Node.
 *
 *   node examples/browser/check.ts [FOLDER of a run or model; default: random weights]
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { createBackend } from '@moe/backend-tfjs'
import { setDefaultBackend } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { BpeTokenizer, trainBpe } from '@moe/tokenizer-bpe'
import { modelFolder } from '@moe/trainer'
import { bundlePage } from '../../scripts/bundle-page.ts'
import { inChromium } from '../../scripts/in-chromium.ts'

setDefaultBackend(await createBackend())
const prompt = 'My fellow Americans'
const work = mkdtempSync(join(tmpdir(), 'moe-browser-check-'))
try {
  const folder = process.argv[2] === undefined ? await randomModel(work) : modelFolder(process.argv[2])
  const program = (backend: string) => `
import { setDefaultBackend } from '@moe/core'
import { DeepSeek } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-webgpu'
import { BpeTokenizer } from '@moe/tokenizer-bpe'
import { pickBackend } from './backend.js'

const backend = await ${backend}
setDefaultBackend(backend)
const folder = new URL('model/', document.baseURI)
const tokenizer = await BpeTokenizer.fromJSONAsync(await (await fetch(new URL('tokenizer.json', folder))).text())
let progress
const model = await DeepSeek.fromPretrained(folder, { onProgress: now => (progress = now) })
const code = await model.save('anywhere').catch(({ code }) => code)
const started = performance.now()
let text = ''
const generation = model.generate(tokenizer.encode(${JSON.stringify(prompt)}), { tokenizer, maxTokens: 100 })
for await (const piece of generation) text += piece
await report({ device: backend.device, progress, code, tokensPerSecond: (1000 * generation.stats.tokens) / (performance.now() - started), text })
`
  const wasm = dirname(createRequire(import.meta.url).resolve('@tensorflow/tfjs-backend-wasm'))
  const here = await textInNode(folder)
  // Without a GPU, the page falls back to WebAssembly.
  for (const backend of ['createBackend({ software: true })', 'pickBackend()']) {
    const bundle = await bundlePage({ contents: program(backend), resolveDir: import.meta.dirname })
    const there = (await inChromium(bundle, { folders: { '/model/': folder, '/wasm/': wasm }, seconds: 560 })) as Report
    console.log({ ...there, bundleKilobytes: Math.round(bundle.length / 1000), same: there.text === here })
    // The copies of shared weights in MTP layers are not read.
    const whole = there.progress.bytes > 0.9 * there.progress.totalBytes
    if (there.text !== here || there.text === '' || there.code !== 'E_UNSUPPORTED' || !whole) process.exitCode = 1
  }
} finally {
  rmSync(work, { recursive: true, force: true })
}

interface Report {
  readonly device: string
  readonly progress: { readonly bytes: number; readonly totalBytes: number }
  readonly code: string
  readonly tokensPerSecond: number
  readonly text: string
}

async function randomModel(folder: string): Promise<string> {
  const tokenizer = trainBpe([`${prompt}, the state of the union is as it was. `.repeat(20)], { vocabSize: 300 })
  const model = new DeepSeek({ ...presets.tiny, vocab_size: tokenizer.vocabSize, initializer_range: 0.3 }, { seed: 1 })
  await model.save(folder)
  await tokenizer.save(join(folder, 'tokenizer.json'))
  model.dispose()
  return folder
}

async function textInNode(folder: string): Promise<string> {
  const tokenizer = await BpeTokenizer.fromFile(join(folder, 'tokenizer.json'))
  const model = await DeepSeek.fromPretrained(folder)
  let text = ''
  for await (const piece of model.generate(tokenizer.encode(prompt), { tokenizer, maxTokens: 100 })) text += piece
  model.dispose()
  return text
}
