// The ids that llama.cpp makes of texts, for a comparison with @moe/tokenizer-bpe (packages/deepseek/src/gguf/llama-cpp.test.ts).
//
//     node bench/peers/llama-cpp/tokenize.mjs FILE TEXTS     texts as JSON
//
// Prints JSON: the ids of each text and the text that they decode to.
import { open } from './open.mjs'

const [path, texts] = process.argv.slice(2)
const { model } = await open(path, { threads: 2, contextSize: 64 })
const answers = JSON.parse(texts).map(text => {
  const ids = model.tokenize(text, true)
  return { ids, decoded: model.detokenize(ids, true) }
})
process.stdout.write(JSON.stringify(answers), () => process.exit(0))
