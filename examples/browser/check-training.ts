/**
 * @file Trains a small model in headless Chromium, in a page and in a worker. Losses, weights and text must equal those of Node, also after
 * stopping and resuming from the origin's storage, and the page must stay responsive.
 *
 *   node examples/browser/check-training.ts
 */
import { createRequire } from 'node:module'
import { dirname } from 'node:path'
import { createBackend } from '@moe/backend-tfjs'
import { setDefaultBackend } from '@moe/core'
import { bundlePage } from '../../scripts/bundle-page.ts'
import { inChromium } from '../../scripts/in-chromium.ts'
import { type Trained, trainTwice } from './small-training.ts'

const program = `
import { setDefaultBackend } from '@moe/core'
import { pickBackend } from './backend.js'
import { trainTwice } from './small-training.ts'

const inWorker = globalThis.document === undefined
const folder = async name => (await navigator.storage.getDirectory()).getDirectoryHandle(name, { create: true })
setDefaultBackend(await pickBackend())
if (inWorker) postMessage(await trainTwice(await folder('in-worker')))
else {
  let turns = 0
  const timer = setInterval(() => turns++, 1)
  const inPage = await trainTwice(await folder('in-page'))
  clearInterval(timer)
  const worker = new Worker(new URL('program.js', location.href), { type: 'module' })
  const inWorker = await new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => resolve(data)
    worker.onerror = ({ message }) => reject(new Error(message))
  })
  await report({ inPage, inWorker, turns })
}
`
const bundle = await bundlePage({ contents: program, resolveDir: import.meta.dirname })
const wasm = dirname(createRequire(import.meta.url).resolve('@tensorflow/tfjs-backend-wasm'))
const there = (await inChromium(bundle, { folders: { '/wasm/': wasm }, seconds: 300 })) as {
  readonly inPage: Trained
  readonly inWorker: Trained
  readonly turns: number
}
setDefaultBackend(await createBackend())
const here = await trainTwice(undefined)
const same = (other: Trained) =>
  JSON.stringify({ ...here, pathRefused: '' }) === JSON.stringify({ ...other, pathRefused: '' })
const found = {
  losses: here.losses,
  text: here.text,
  pathRefused: there.inPage.pathRefused,
  samePage: same(there.inPage),
  sameWorker: same(there.inWorker),
  turnsPerStep: there.turns / here.losses.length,
}
console.log(found)
const alive = found.turnsPerStep > 1
process.exitCode = found.samePage && found.sameWorker && alive && found.pathRefused.startsWith('E_UNSUPPORTED') ? 0 : 1
