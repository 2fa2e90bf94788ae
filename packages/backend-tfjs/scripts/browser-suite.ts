/**
 * @file Runs the backend suite on TensorFlow.js from npm in headless Chromium, with a software GPU if there is no GPU.
 *
 *   node packages/backend-tfjs/scripts/browser-suite.ts webgpu|webgl|wasm|cpu [part of the names of checks]
 */
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { suiteInChromium } from '../../../scripts/bundle-suite.ts'

const [name = 'webgpu', part = ''] = process.argv.slice(2)
const inexact = ['sin', 'cos'].flatMap(code => [`unary: ${code}`, `unary: ${code} of special values`])
const onGpu = [{ reason: 'shaders need not compute sine and cosine to more than 2^-11', checks: inexact }]
const skip = {
  webgpu: onGpu,
  webgl: [...onGpu, { reason: 'integers lie in f32', checks: ['cast: f32 to i32'] }],
}[name]
const work = mkdtempSync(join(tmpdir(), 'moe-browser-suite-'))
try {
  const kernels = `@tensorflow/tfjs-backend-${name}`
  writeFileSync(join(work, 'package.json'), '{}')
  execFileSync(
    'npm',
    ['install', '--no-audit', '--no-fund', '--loglevel=error', '@tensorflow/tfjs-core@4.22.0', `${kernels}@4.22.0`],
    { cwd: work, stdio: ['ignore', 'ignore', 'inherit'], shell: process.platform === 'win32' },
  )
  const setup = `
import * as tf from '@tensorflow/tfjs-core'
import * as kernels from '${kernels}'
import { tfjsBackend } from ${JSON.stringify(fileURLToPath(new URL('../src/tfjs-backend.ts', import.meta.url)))}

kernels.setWasmPaths?.('/files/')
await tf.setBackend('${name}')
await tf.ready()
// A command that WebGPU rejects fails silently, together with everything submitted with it.
tf.backend().device?.addEventListener('uncapturederror', ({ error }) => note(error.message.slice(0, 1500)))
tf.backend().device?.lost.then(({ reason, message }) => note('the device was lost: ' + reason + ' ' + message))
const backend = tfjsBackend(tf)`
  const files = join(work, 'node_modules', kernels, 'dist')
  await suiteInChromium({ setup, resolveDir: work, part, skip }, { '/files/': files })
} finally {
  rmSync(work, { recursive: true, force: true })
}
