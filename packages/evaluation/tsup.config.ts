import { library } from '../../scripts/tsup-preset.ts'

export default library({ index: 'src/index.ts', cli: 'src/cli.ts' })
