import { library } from '../../scripts/tsup-preset.ts'

export default library({
  index: 'src/index.ts',
  'data/index': 'src/data/index.ts',
  cli: 'src/cli.ts',
  worker: 'src/batch/worker.ts',
})
