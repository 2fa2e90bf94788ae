import { browserLibrary, library } from '../../scripts/tsup-preset.ts'

export default [
  library({ index: 'src/index.ts', tokenize: 'src/tokenize/index.ts', watch: 'src/watch/index.ts', cli: 'src/cli.ts' }),
  browserLibrary({ index: 'src/index.ts' }, ['tinyglobby']),
]
