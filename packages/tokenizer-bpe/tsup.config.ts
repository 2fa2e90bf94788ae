import { library } from '../../scripts/tsup-preset.ts'

export default library({
  index: 'src/index.ts',
  browser: 'src/browser.ts',
  // An entry without training and general pre-tokenizers, so that esbuild puts these in files of their own, which bundlers can leave out.
  tokenizer: 'src/tokenizer.ts',
  'data/index': 'src/data/index.ts',
  cli: 'src/cli.ts',
  worker: 'src/batch/worker.ts',
})
