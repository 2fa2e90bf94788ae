/** @file Saves LoRA adapters without their base model, as PEFT does. */
import { checkOptions, type Module, MoeError, namedAdapters, namedParameters } from '@moe/core'
import { targetFolder } from '../locations.ts'
import { pathOf } from '../path-of.ts'
import { writeWithText } from '../with-text.ts'
import { writeInFolder } from '../write-safetensors.ts'
import { adapterConfigJson, CONFIG_FILE, PREFIX, TENSOR_FILE } from './adapter-config.ts'
import { baseDigest } from './base-digest.ts'
import { pathOfWeight, pathsOf, storedAdapters } from './stored-adapters.ts'

/** Options of {@link saveAdapters}. */
export interface SaveAdaptersOptions {
  /** Folder of the base model, or its name on the Hugging Face Hub, stored as `base_model_name_or_path`. Default: none. */
  readonly base?: string | undefined
}

/**
 * Writes the adapters of a module into a folder, as `adapter_model.safetensors` (f32) and `adapter_config.json`. PEFT and
 * {@link loadAdapters} read both, including adapters of experts. The metadata contains a digest of the base model, which `loadAdapters`
 * checks. If another adapter is replaced, a crash between the two files leaves a folder that `loadAdapters` refuses.
 *
 * @throws {MoeError} `E_CONFIG` if the module has no adapters, or if other parameters are trainable too, since they would be lost;
 *   `E_CHECKPOINT` if writing fails
 */
export async function saveAdapters(
  folder: string | URL,
  module: Module,
  options: SaveAdaptersOptions = {},
): Promise<void> {
  checkOptions('saveAdapters', options, { base: true })
  const path = pathOf('saveAdapters', folder)
  const named = namedAdapters(module)
  const [first] = named
  if (first === undefined) throw refusal('the module has no adapters', 'add them with addAdapters(module)')
  const matrices = new Set(named.flatMap(({ adapter: { down, up } }) => [down, up]))
  const other = namedParameters(module).find(({ parameter }) => parameter.trainable && !matrices.has(parameter))
  if (other !== undefined) {
    throw refusal(
      `${other.name} is trainable but not an adapter, and would not be saved`,
      'set its trainable to false, or call mergeAdapters and save the whole model',
    )
  }
  const rankOf = ({ adapter: { down, scale } }: (typeof named)[number]) => ({ rank: down.shape[down.rank - 2], scale })
  const { rank, scale } = rankOf(first)
  const uneven = named.find(one => rankOf(one).rank !== rank || rankOf(one).scale !== scale)
  if (uneven !== undefined)
    throw refusal(`${uneven.name} and ${first.name} differ in rank or alpha`, 'use the same for all adapters')
  const { adapters, base } = storedAdapters(module)
  const digest = await baseDigest(base)
  const metadata = { format: 'pt', base: digest }
  const entries = adapters.map(({ name, dtype, shape, data }) => ({ name: `${PREFIX}${name}`, dtype, shape, data }))
  const targets = targetsOf(
    named.flatMap(pathsOf),
    base.map(({ name }) => pathOfWeight(name)),
  )
  const json = adapterConfigJson({ rank, scale, base: options.base }, targets)
  await writeWithText('saveAdapters', path, { name: CONFIG_FILE, text: json }, beforeSwitch =>
    writeInFolder(targetFolder('saveAdapters', path), TENSOR_FILE, entries, { metadata }, beforeSwitch),
  )
}

/** The last components of the paths if no other weight has the same ones, otherwise the full paths. */
function targetsOf(adapted: readonly string[], all: readonly string[]): string[] {
  const last = (path: string) => path.slice(path.lastIndexOf('.') + 1)
  const ends = new Set(adapted.map(last))
  const paths = new Set(adapted)
  return all.every(path => paths.has(path) || !ends.has(last(path))) ? [...ends].sort() : [...paths]
}

const refusal = (problem: string, fix: string) => new MoeError({ code: 'E_CONFIG', op: 'saveAdapters', problem, fix })
