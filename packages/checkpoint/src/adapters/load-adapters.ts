/** @file Opens low-rank adapters that were saved here or by PEFT. */
import { existsSync } from 'node:fs'
import { join, resolve } from 'node:path'
import {
  addAdapters,
  fromHost,
  isMoeError,
  type Module,
  type NamedParameter,
  namedAdapters,
  namedParameters,
  removeAdapters,
  sameShape,
  showShape,
} from '@moe/core'
import { checkpointError, shown } from '../checkpoint-error.ts'
import { pathOf } from '../path-of.ts'
import { readF32 } from '../read-f32.ts'
import { readSafetensors, type TensorSource } from '../read-safetensors.ts'
import { type AdapterConfig, CONFIG_FILE, PREFIX, readAdapterConfig, TENSOR_FILE } from './adapter-config.ts'
import { baseDigest } from './base-digest.ts'
import { pathOfWeight, pathsOf, type StoredAdapters, storedAdapters } from './stored-adapters.ts'

/**
 * Puts the adapters of a folder beside the weights of a module, or fills those that it has, which must then be the same. `addAdapters` tells what is frozen. bf16 and f16 become f32.
 * Nothing is changed unless everything fits.
 * @throws {MoeError} `E_CHECKPOINT` for files that are damaged or ask for more than adapters of one rank beside linear layers and experts, and for tensors that do not fit the module, are not
 *   finite, or were made for another base
 */
export async function loadAdapters(module: Module, folder: string | URL): Promise<void> {
  const path = pathOf('loadAdapters', folder)
  const config = await readAdapterConfig(join(path, CONFIG_FILE))
  await using file = await readSafetensors(join(path, TENSOR_FILE))
  const stored = storedAdapters(module)
  await checkBase(file, stored)
  const weights = checkTensors(file, config, module, stored)
  const present = namedAdapters(module)
  if (present.length > 0) checkSame(file, config, weights, present)
  const values = await readAll(file, weights)
  if (present.length === 0) attach(file, config, weights, module)
  try {
    for (const { name, adapter } of namedAdapters(module)) {
      const { A, B } = values.get(name) as Parts<Float32Array>
      for (const [parameter, numbers] of [
        [adapter.down, A],
        [adapter.up, B],
      ] as const)
        parameter.assign(fromHost(numbers, parameter.shape, 'f32', parameter.backend))
    }
  } catch (error) {
    if (present.length === 0) removeAdapters(module)
    throw error
  }
}

/**
 * Folder of the model that the adapters of a folder stand beside, as `adapter_config.json` names it; what is no absolute path begins at the folder. Undefined where the folder has a config.json, or no
 * adapters.
 * @throws {MoeError} `E_CHECKPOINT` where no base is named, or one that is not here: nothing is downloaded
 */
export async function adapterBase(folder: string | URL): Promise<string | undefined> {
  const path = pathOf('adapterBase', folder)
  const file = join(path, CONFIG_FILE)
  if (existsSync(join(path, 'config.json')) || !existsSync(file)) return undefined
  const { base } = await readAdapterConfig(file)
  const found = base === undefined ? undefined : resolve(path, base)
  if (found !== undefined && existsSync(join(found, 'config.json'))) return found
  throw checkpointError(
    file,
    base === undefined ? 'it names no base' : `its base ${shown(base)} is no folder of a model here`,
    'open the base, then put the adapters beside it: await loadAdapters(model, folder)',
  )
}

type Parts<T> = { readonly A: T; readonly B: T }

/** Key of a matrix of the weight with this path. */
const keyOf = (path: string, part: keyof Parts<unknown>) =>
  `${PREFIX}${path === '' ? '' : `${path}.`}lora_${part}.weight`

async function checkBase(file: TensorSource, { base }: StoredAdapters): Promise<void> {
  const wanted = file.metadata['base']
  if (wanted === undefined || wanted === (await baseDigest(base))) return
  throw checkpointError(
    file.path,
    'the adapters were made for another base: its norms, or the names or shapes of its weights, are not those of this module',
    `open the base that ${CONFIG_FILE} names`,
  )
}

/** The weights that the file has adapters for. Every fault is told at once. */
function checkTensors(
  file: TensorSource,
  { rank }: AdapterConfig,
  module: Module,
  stored: StoredAdapters,
): NamedParameter[] {
  const shapes = new Map(stored.base.map(({ name, shape }) => [pathOfWeight(name), shape]))
  const problems: string[] = []
  const adapted = new Set<string>()
  for (const key of file.keys()) {
    const path = /^base_model\.model\.(?:(.+)\.)?lora_[AB]\.weight$/.exec(key)
    if (path === null) problems.push(`${shown(key)} is no matrix of an adapter`)
    else adapted.add(path[1] ?? '')
  }
  for (const path of adapted) {
    const weight = shapes.get(path)
    if (weight?.length !== 2) {
      problems.push(`${shown(path)} is no matrix of the module`)
      continue
    }
    const [rows, columns] = weight
    for (const [part, shape] of Object.entries({ A: [rank, columns], B: [rows, rank] }) as Array<
      ['A' | 'B', number[]]
    >) {
      const key = keyOf(path, part)
      if (!file.has(key)) problems.push(`${shown(key)} is missing`)
      else if (!sameShape(file.info(key).shape, shape)) {
        problems.push(`${shown(key)} is ${showShape(file.info(key).shape)}, needs ${showShape(shape)} for rank ${rank}`)
      }
    }
  }
  const chosen = namedParameters(module).filter(named => {
    const paths = pathsOf(named)
    const count = paths.filter(path => adapted.has(path)).length
    if (count > 0 && count < paths.length) {
      problems.push(`of the ${paths.length} experts of ${named.name} only ${count} have adapters`)
    }
    return count > 0
  })
  if (adapted.size === 0) problems.push('there are no adapters in it')
  if (problems.length === 0) return chosen
  const lines = problems.slice(0, 20)
  if (problems.length > lines.length) lines.push(`and ${problems.length - lines.length} more`)
  throw checkpointError(
    file.path,
    `the adapters do not fit the module:\n${lines.map(line => `    ${line}`).join('\n')}\n`,
    `open the base that ${CONFIG_FILE} names`,
    { problems },
  )
}

function checkSame(
  file: TensorSource,
  { rank, scale }: AdapterConfig,
  weights: readonly NamedParameter[],
  present: ReturnType<typeof namedAdapters>,
): void {
  const names = new Set(weights.map(({ name }) => name))
  const same = present.every(
    ({ name, adapter: { down, scale: own } }) =>
      names.has(name) && down.shape[down.rank - 2] === rank && Math.abs(own / scale - 1) < 1e-6,
  )
  if (same && names.size === present.length) return
  throw checkpointError(
    file.path,
    `it has adapters of rank ${rank} and α ${scale * rank} beside ${names.size} weights, the module has others`,
    'call addAdapters with the options that they were made with, or load into a module without adapters',
  )
}

function attach(
  file: TensorSource,
  { rank, scale }: AdapterConfig,
  weights: readonly NamedParameter[],
  module: Module,
): void {
  const paths = new Set(weights.map(({ name }) => pathOfWeight(name)))
  let cause: unknown
  try {
    addAdapters(module, { rank, alpha: scale * rank, targets: path => paths.delete(path) })
    if (paths.size === 0) return
    removeAdapters(module)
  } catch (error) {
    if (!isMoeError(error, 'E_CONFIG')) throw error
    cause = error
  }
  const where = [...paths].slice(0, 5).join(', ')
  throw checkpointError(file.path, `it has adapters for ${where}, where none can be`, undefined, {}, cause)
}

/** All numbers of A and B, by name of the weight; of experts those of all of them in one array. */
async function readAll(
  file: TensorSource,
  weights: readonly NamedParameter[],
): Promise<Map<string, Parts<Float32Array>>> {
  const all = new Map<string, Parts<Float32Array>>()
  for (const named of weights) {
    const paths = pathsOf(named)
    const read = async (part: 'A' | 'B') => {
      const size = file.info(keyOf(paths[0], part)).shape.reduce((product, axis) => product * axis, 1)
      const values = new Float32Array(size * paths.length)
      for (const [i, path] of paths.entries()) values.set(await readFinite(file, keyOf(path, part)), i * size)
      return values
    }
    all.set(named.name, { A: await read('A'), B: await read('B') })
  }
  return all
}

async function readFinite(file: TensorSource, key: string): Promise<Float32Array> {
  const { data } = await readF32(file, key)
  const at = data.findIndex(value => !Number.isFinite(value))
  if (at < 0) return data
  throw checkpointError(
    file.path,
    `tensor ${shown(key)} has ${data[at]} at place ${at}`,
    'it was damaged or diverged in training',
    { key },
  )
}
