/** @file Which layers of a model with sparse attention have an indexer, and which share that of an earlier layer. */

/** `full`: the layer has an indexer. `shared`: it attends to the keys that the nearest indexer before it has selected. */
export type IndexerType = 'full' | 'shared'

/** The settings, of which any may be missing. */
interface Sharing {
  readonly num_hidden_layers: number
  readonly indexer_types?: readonly IndexerType[] | null | undefined
  readonly index_topk_pattern?: string | null | undefined
  readonly index_topk_freq?: number | null | undefined
  readonly index_skip_topk_offset?: number | null | undefined
}

const letters = { full: 'F', shared: 'S' } as const

/** The types as one letter per layer, the form that vLLM and SGLang read. */
export const patternOf = (types: readonly IndexerType[]): string => types.map(type => letters[type]).join('')

/** Returns the type of each layer, or null if all have an indexer. The list precedes the pattern, and that the schedule. */
export function indexerTypes(config: Sharing): IndexerType[] | null {
  const { num_hidden_layers: layers, indexer_types: list, index_topk_pattern: pattern } = config
  const types: IndexerType[] = list
    ? [...list]
    : Array.from(pattern ?? scheduled(config, layers), letter => (letter === 'F' ? 'full' : 'shared'))
  return types.includes('shared') ? types : null
}

/** The pattern of one indexer for a number of layers, from the last of the leading layers on, as in transformers. Empty if there is none. */
function scheduled({ index_topk_freq, index_skip_topk_offset: offset }: Sharing, layers: number): string {
  const every = index_topk_freq ?? 1
  if (every === 1) return ''
  const isFull = (layer: number) => Math.max(0, layer + 1 - (offset ?? 2)) % every === 0
  return Array.from({ length: layers }, (_, layer) => (isFull(layer) ? 'F' : 'S')).join('')
}

/** Returns the problems of the settings. */
export function indexerTypeProblems(config: Sharing): string[] {
  const { num_hidden_layers: layers, indexer_types: list, index_topk_pattern: pattern } = config
  const problems: string[] = []
  const given = { indexer_types: list?.length, index_topk_pattern: pattern?.length }
  for (const [key, length = layers] of Object.entries(given)) {
    if (length !== layers) problems.push(`${key} has ${length} entries, but num_hidden_layers = ${layers}`)
  }
  if (list && pattern != null && patternOf(list) !== pattern) {
    problems.push(`indexer_types and index_topk_pattern = ${pattern} disagree`)
  }
  if (indexerTypes(config)?.[0] === 'shared') problems.push('the first layer has no indexer before it to share')
  return problems
}
