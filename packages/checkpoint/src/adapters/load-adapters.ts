/** @file Loads LoRA adapters that were saved by this package or by PEFT. */
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
 * Loads the adapters of a folder into a module. A module without adapters gets them, as from `addAdapters`; existing adapters must have
 * the same rank, alpha and targets, and are overwritten. bf16 and f16 adapters become f32. If anything does not fit, the module is left
 * unchanged.
 *
 * @throws {MoeError} `E_CHECKPOINT` for corrupt files, unsupported PEFT features (only LoRA of one rank for linear layers and experts
 *   is supported), tensors that do not fit the module or are not finite, and adapters of a different base model
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
 * Returns the folder of the base model that `adapter_config.json` names. Relative paths are relative to the adapter folder. Returns
 * undefined if the folder contains a config.json (a complete model) or no adapters.
 *
 * @throws {MoeError} `E_CHECKPOINT` if no base model is named, or it is not a local folder: nothing is downloaded
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
    base === undefined
      ? 'it names no base model'
      : `its base model ${shown(base)} is not a folder on this machine that contains a model`,
    'open the base model yourself, then add the adapters: await loadAdapters(model, folder)',
  )
}

type Parts<T> = { readonly A: T; readonly B: T }

/** The key of one adapter matrix of a weight. */
const keyOf = (path: string, part: keyof Parts<unknown>) =>
  `${PREFIX}${path === '' ? '' : `${path}.`}lora_${part}.weight`

async function checkBase(file: TensorSource, { base }: StoredAdapters): Promise<void> {
  const wanted = file.metadata['base']
  if (wanted === undefined || wanted === (await baseDigest(base))) return
  throw checkpointError(
    file.path,
    'the adapters were trained on a different base model: the names, shapes or norms of the weights differ',
    `load them into the base model that ${CONFIG_FILE} names`,
  )
}

/** Returns the weights that the file contains adapters for. Reports all problems at once. */
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
    if (path === null) problems.push(`${shown(key)} is not the key of an adapter matrix`)
    else adapted.add(path[1] ?? '')
  }
  for (const path of adapted) {
    const weight = shapes.get(path)
    if (weight?.length !== 2) {
      problems.push(`the module has no weight matrix ${shown(path)}`)
      continue
    }
    const [rows, columns] = weight
    for (const [part, shape] of Object.entries({ A: [rank, columns], B: [rows, rank] }) as Array<
      ['A' | 'B', number[]]
    >) {
      const key = keyOf(path, part)
      if (!file.has(key)) problems.push(`${shown(key)} is missing`)
      else if (!sameShape(file.info(key).shape, shape)) {
        problems.push(
          `${shown(key)} has shape ${showShape(file.info(key).shape)}, expected ${showShape(shape)} for rank ${rank}`,
        )
      }
    }
  }
  const chosen = namedParameters(module).filter(named => {
    const paths = pathsOf(named)
    const count = paths.filter(path => adapted.has(path)).length
    if (count > 0 && count < paths.length) {
      problems.push(`only ${count} of the ${paths.length} experts of ${named.name} have adapters`)
    }
    return count > 0
  })
  if (adapted.size === 0) problems.push('the file contains no adapters')
  if (problems.length === 0) return chosen
  const lines = problems.slice(0, 20)
  if (problems.length > lines.length) lines.push(`and ${problems.length - lines.length} more`)
  throw checkpointError(
    file.path,
    `the adapters do not fit the module:\n${lines.map(line => `    ${line}`).join('\n')}\n`,
    `load them into the base model that ${CONFIG_FILE} names`,
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
    `the file has adapters of rank ${rank} and alpha ${scale * rank} for ${names.size} weights, which differ from those of the module`,
    'call addAdapters with the options they were created with, or load into a module without adapters',
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
  throw checkpointError(file.path, `it has adapters for ${where}, which cannot have adapters`, undefined, {}, cause)
}

/** Reads all A and B matrices, by name of the weight. Those of all experts of a layer are concatenated. */
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
    `tensor ${shown(key)} contains ${data[at]} at index ${at}`,
    'the file is corrupt, or training diverged',
    { key },
  )
}
