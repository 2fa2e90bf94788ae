// Peer of `pnpm bench decode`: greedy text of llama.cpp at batch 1 from a GGUF file.
//
//     node bench/peers/llama-cpp/decode.mjs --file 200m.q8_0.gguf --tokens 32
//
// Prints a line of JSON when the model is ready, and then one for each line `run` on its input, with the milliseconds of each token after
// the first and the average processor time per token.
import { cpus } from 'node:os'
import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'
import { device, open } from './open.mjs'

const { values: options } = parseArgs({
  options: {
    file: { type: 'string' },
    tokens: { type: 'string', default: '32' },
    threads: { type: 'string', default: String(cpus().length) },
  },
})
const tokens = Number(options.tokens)
const prompt = Array.from({ length: 16 }, (_, i) => 7 + 3 * i)
const { model, sequence } = await open(options.file, { threads: Number(options.threads), contextSize: 512 })

async function run() {
  await sequence.clearHistory()
  const times = []
  let usage = process.cpuUsage()
  let before = performance.now()
  for await (const _ of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    const now = performance.now()
    times.push(now - before)
    if (times.length === 1) usage = process.cpuUsage()
    before = now
    if (times.length > tokens) break
  }
  const { user, system } = process.cpuUsage(usage)
  return { milliseconds: times.slice(1), processor: (user + system) / 1000 / (times.length - 1) }
}

const reply = value => process.stdout.write(`${JSON.stringify(value)}\n`)
await run()
reply({ device, weightBytes: model.size, residentBytes: process.memoryUsage().rss })
for await (const line of createInterface({ input: process.stdin })) {
  if (line !== 'run') break
  reply(await run())
}
process.exit(0)
