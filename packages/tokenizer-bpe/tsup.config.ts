import { library } from '../../scripts/tsup-preset.ts'

/** Modules that are loaded on demand (src/features.ts). As entries they keep their names, and cause no extra chunks. */
const features = [
  'scan/cl100k',
  'scan/deepseek-llm',
  'scan/deepseek-v3',
  'scan/gpt2',
  'scan/o200k',
  'json/pre-tokenizer-steps',
  'json/template',
  'normalizer',
  'bpe/token-lookup',
  'tiktoken',
  'unicode/pinned-classes',
  'encode-stream',
  'batch/pool',
]

const entries = {
  index: 'src/index.ts',
  browser: 'src/browser.ts',
  // An entry without training and features, so that esbuild puts these into separate files, which bundlers can omit.
  tokenizer: 'src/tokenizer.ts',
  'data/index': 'src/data/index.ts',
  cli: 'src/cli.ts',
  // A name that no file beside a user's bundle has (src/batch/pool.ts).
  'moe-tokenizer-worker': 'src/batch/worker.ts',
}
const featureEntries = Object.fromEntries(features.map(path => [path.split('/').pop()!, `src/${path}.ts`]))

export default Object.assign(library({ ...entries, ...featureEntries }), { dts: { entry: entries } })
