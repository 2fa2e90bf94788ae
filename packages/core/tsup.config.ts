import { library } from '../../scripts/tsup-preset.ts'

export default library({
  index: 'src/index.ts',
  'reference/index': 'src/reference/index.ts',
  strides: 'src/strides.ts',
  'testing/index': 'src/testing/index.ts',
})
