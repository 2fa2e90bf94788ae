/** @file Low-rank adapters ("LoRA", Hu et al. 2021): small trainable matrices beside frozen weights. */
import { rand, zeros } from '../create.ts'
import { MoeError } from '../errors.ts'
import { dequantizeWeight } from '../fused/quantized-matmul.ts'
import { checkOptions } from '../options.ts'
import { type Adapter, Parameter } from '../parameter.ts'
import { Random } from '../random.ts'
import { disposeOnError, keep, scope } from '../scope.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { pacer } from '../turns.ts'
import { Embedding, OutputHead } from './layers.ts'
import { type Module, type NamedParameter, namedParameters, parametersOf, weightPath } from './module.ts'
import { denseWeight, modulesOf, QuantizedParameter, quantizedRows, rowsPerChunk, weightShape } from './quantized.ts'

/** Options of `addAdapters`. */
export interface AdapterOptions {
  /** Rank r: rows of A and columns of B. Default 16. */
  readonly rank?: number | undefined
  /** α: B A is scaled by α / r, so that one learning rate suits different ranks. Default 32. */
  readonly alpha?: number | undefined
  /**
   * Which weights get an adapter: ends of their paths without `.weight`, for example `o_proj`, `self_attn.o_proj`, or
   * `experts.up_proj` for the up projections of routed experts; or a function of the whole path. Default: the weights
   * of all linear layers and experts, except the output head.
   */
  readonly targets?: readonly string[] | ((path: string) => boolean) | undefined
  /** Source of the initial A. Each adapter uses its own stream, identified by its name. Default: `new Random(0)`. */
  readonly random?: Random | undefined
}

/** A weight with its adapter. */
export interface NamedAdapter extends NamedParameter {
  /** The matrices themselves, not copies. */
  readonly adapter: Adapter
}

/** The parameters that `addAdapters` has frozen, and whether each was trainable before. */
const frozen = new WeakMap<Parameter, boolean>()

/** Returns whether the parameter was frozen by `addAdapters`. Neither gradients nor balancers change it. */
export const isFrozen = (parameter: Parameter): boolean => frozen.has(parameter)

/**
 * Adds an adapter to each of the chosen weights, with B zero and A uniform in ±1/√K, so that the module's output does
 * not change at first. Everything else is frozen, including buffers such as a router's selection bias, because the
 * adapters are learned for exactly this base model. Weights may be quantized before or afterwards.
 *
 * Embeddings get no adapter, nor does an output head that shares its weight with one.
 * @throws MoeError E_CONFIG for an invalid rank or α, unknown targets, or a module that already has adapters;
 * E_OUT_OF_MEMORY, without any change to the module
 */
export function addAdapters(module: Module, options: AdapterOptions = {}): void {
  checkOptions('addAdapters', options, { rank: true, alpha: true, targets: true, random: true })
  const { rank = 16, alpha = 32, targets, random = new Random(0) } = options
  if (!Number.isSafeInteger(rank) || rank < 1)
    throw configError(`rank is ${rank}`, 'pass a positive integer, such as 16')
  if (!(Number.isFinite(alpha) && alpha > 0))
    throw configError(`alpha is ${alpha}`, 'pass a positive number, such as 32')
  if (adaptersOf('addAdapters', module).length > 0) {
    throw configError(
      'the module already has adapters',
      'merge them with mergeAdapters first, or train the existing ones',
    )
  }
  const chosen = choose(module, targets)
  const make = ({ name, parameter }: NamedParameter) => ({
    parameter,
    adapter: makeAdapter(name, parameter, rank, alpha, random),
  })
  const made = disposeOnError(() => chosen.map(make))
  for (const { parameter } of namedParameters(module)) {
    frozen.set(parameter, parameter.trainable)
    parameter.trainable = false
  }
  for (const { parameter, adapter } of made) {
    parameter.adapter = adapter
    parameter.version++
  }
}

function makeAdapter(name: string, parameter: Parameter, rank: number, alpha: number, random: Random): Adapter {
  const shape = weightShape(parameter)
  const [rows, columns] = shape.slice(-2)
  const lead = shape.slice(0, -2)
  const { backend } = parameter
  const bound = 1 / Math.sqrt(columns)
  const draws = random.fork(`adapter/${weightPath(name)}`)
  return {
    down: new Parameter(rand([...lead, rank, columns], draws, { low: -bound, high: bound, backend })),
    up: new Parameter(zeros([...lead, rows, rank], { backend })),
    scale: alpha / rank,
  }
}

/** Returns the weights that can have an adapter, by name. */
function adaptable(module: Module): Array<NamedParameter & { readonly isHead: boolean }> {
  const parts = [...modulesOf(module)]
  const weightsOf = (some: readonly Module[]) =>
    some.flatMap(part => (part.quantizable ?? []).map(field => (part as unknown as Record<string, Parameter>)[field]))
  const all = new Set(weightsOf(parts))
  const heads = new Set(weightsOf(parts.filter(part => part instanceof OutputHead)))
  for (const table of weightsOf(parts.filter(part => part instanceof Embedding))) all.delete(table)
  return namedParameters(module)
    .filter(({ parameter }) => all.has(parameter))
    .map(named => ({ ...named, isHead: heads.has(named.parameter) }))
}

function choose(module: Module, targets: AdapterOptions['targets']): NamedParameter[] {
  const weights = adaptable(module)
  const available = [...new Set(weights.map(({ name }) => weightPath(name).split('.').at(-1)))].join(', ')
  if (weights.length === 0) {
    throw configError(
      'the module has no weights that can have an adapter',
      'use linear layers, or list its own weights in `quantizable` and apply them with linear() and groupedLinear()',
    )
  }
  if (targets === undefined) {
    const usual = weights.filter(({ isHead }) => !isHead)
    return usual.length > 0 ? usual : weights
  }
  if (typeof targets === 'function') {
    const wanted = weights.filter(({ name }) => targets(weightPath(name)))
    if (wanted.length === 0)
      throw configError('targets selects no weight', `select paths that end in one of: ${available}`)
    return wanted
  }
  const isOf = (target: string) => (named: NamedParameter) => `.${weightPath(named.name)}`.endsWith(`.${target}`)
  const fix = `pass ends of these paths: ${available}`
  if (!Array.isArray(targets) || targets.length === 0 || !targets.every(target => typeof target === 'string')) {
    throw configError('targets is not a list of names', fix)
  }
  const missing = targets.filter(target => !weights.some(isOf(target)))
  if (missing.length > 0) throw configError(`no weight is named ${missing.join(', ')}`, fix)
  return weights.filter(named => targets.some(target => isOf(target)(named)))
}

/** Returns the weights of a module that have an adapter, each once. */
export function namedAdapters(module: Module): NamedAdapter[] {
  return adaptersOf('namedAdapters', module)
}

function adaptersOf(op: string, module: Module): NamedAdapter[] {
  return parametersOf(op, module).flatMap(named => {
    const { adapter } = named.parameter
    return adapter === null ? [] : [{ ...named, adapter }]
  })
}

/**
 * Adds the adapters to their weights and removes them. The module is then an ordinary one, and what was frozen is
 * trainable again. Quantized weights are rounded again, which in 4 bits can lose much of what was learned; to avoid
 * that, add the adapters to the f32 weights instead.
 *
 * The event loop keeps running meanwhile; do not use the module until the promise resolves.
 */
export async function mergeAdapters(module: Module): Promise<void> {
  const paced = pacer()
  for (const { parameter } of adaptersOf('mergeAdapters', module)) {
    if (parameter instanceof QuantizedParameter) await mergeQuantized(parameter)
    else parameter.assign(noGrad(() => keep(scope(() => denseWeight(parameter)))))
    detachAdapter(parameter)
    await paced()
  }
  unfreeze(module)
}

/** Merges some rows of the first axis at a time, so that a large stack is never in memory as f32 as a whole. */
async function mergeQuantized(parameter: QuantizedParameter): Promise<void> {
  const { weight, adapter } = parameter
  const { down, up, scale } = adapter as Adapter
  const [count] = weight.shape
  const stacked = weight.shape.length === 3
  const rows = rowsPerChunk(weight.shape, weight.block)
  const part = (i: number): Tensor => {
    const [from, to] = [i * rows, Math.min(count, (i + 1) * rows)]
    const ofDown = () => (stacked ? down.narrow(0, from, to) : down)
    const merged = () => {
      const product = up.narrow(0, from, to).mul(scale).matmul(ofDown(), { precision: 'f32' })
      return dequantizeWeight(quantizedRows(weight, from, to)).add(product)
    }
    return keep(scope(() => noGrad(merged)))
  }
  await parameter.assignParts(Math.ceil(count / rows), part)
}

/** Removes the adapters and discards what they have learned: the module is as before `addAdapters`. */
export function removeAdapters(module: Module): void {
  for (const { parameter } of adaptersOf('removeAdapters', module)) detachAdapter(parameter)
  unfreeze(module)
}

function detachAdapter(parameter: Parameter): void {
  const { down, up } = parameter.adapter as Adapter
  parameter.adapter = null
  // `weightVersion` must never return a number that it returned before.
  parameter.version += down.version + up.version + 1
  down.dispose()
  up.dispose()
}

function unfreeze(module: Module): void {
  for (const { parameter } of namedParameters(module)) {
    if (frozen.get(parameter) === true) parameter.trainable = true
    frozen.delete(parameter)
  }
}

function configError(problem: string, fix: string): MoeError {
  return new MoeError({ code: 'E_CONFIG', op: 'addAdapters', problem, fix })
}
