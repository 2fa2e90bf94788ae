import { library } from '../../scripts/tsup-preset.ts'

export default library({
  index: 'src/index.ts',
  cli: 'src/cli.ts',
  // A name that no file beside a user's bundle has (src/grammar-thread.ts).
  'moe-grammar-worker': 'src/grammar-worker.ts',
})
