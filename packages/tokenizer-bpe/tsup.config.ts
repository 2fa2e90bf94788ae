import { library } from '../../scripts/tsup-preset.ts'

/** What loads by need (src/features.ts): as entries these files keep their names, and nothing is put into chunks of its own for their sake. */
const parts = [
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
  // An entry without training and the parts, so that esbuild puts these in files of their own, which bundlers can leave out.
  tokenizer: 'src/tokenizer.ts',
  'data/index': 'src/data/index.ts',
  cli: 'src/cli.ts',
  'moe-tokenizer-worker': 'src/batch/worker.ts',
}
const partEntries = Object.fromEntries(parts.map(path => [path.split('/').pop()!, `src/${path}.ts`]))

export default Object.assign(library({ ...entries, ...partEntries }), { dts: { entry: entries } })
