// What llama.cpp computes for given ids, for a comparison with @moe/deepseek (packages/deepseek/src/gguf/llama-cpp.test.ts).
//
//     node bench/peers/llama-cpp/logits.mjs FILE IDS     ids as JSON
//
// Prints JSON: for each id the logits of what follows it, [time, vocabulary].
import { open } from './open.mjs'

const [path, text] = process.argv.slice(2)
const ids = JSON.parse(text)
const { sequence } = await open(path, { threads: 2, contextSize: 256, exact: true })
const outputs = await sequence.controlledEvaluate(ids.map(id => [id, { generateNext: { logits: true } }]))
const logits = outputs.map(({ next }) => {
  const row = []
  for (const [id, logit] of next.logits) row[id] = logit
  return row
})
process.stdout.write(JSON.stringify(logits), () => process.exit(0))
