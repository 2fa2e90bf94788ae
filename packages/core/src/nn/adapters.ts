/** @file Low-rank adapters ("LoRA", Hu et al. 2021): small matrices beside weights that stay as they are. */
import { noGrad } from '../context.ts'
import { rand, zeros } from '../create.ts'
import { MoeError } from '../errors.ts'
import { dequantizeWeight } from '../fused/quantized-matmul.ts'
import { checkOptions } from '../options.ts'
import { Random } from '../random.ts'
import { allOrNothing, keep, scope } from '../scope.ts'
import type { Tensor } from '../tensor.ts'
import { pacer } from '../turns.ts'
import { Embedding, OutputHead } from './layers.ts'
import { type Module, type NamedParameter, namedParameters, weightPath } from './module.ts'
import { type Adapter, Parameter } from './parameter.ts'
import { denseWeight, modulesOf, QuantizedParameter, rowsAtOnce, storedRows, weightShape } from './quantized.ts'

/** How adapters begin. */
export interface AdapterOptions {
  /** r: rows of A and columns of B. Default 16. */
  readonly rank?: number
  /** α: B A counts α / r times, so that a learning rate which suits one rank suits others. Default 32. */
  readonly alpha?: number
  /**
   * Which weights get one: the ends of their paths without `.weight`, such as `o_proj`, `self_attn.o_proj`, or `experts.up_proj` for the up projections of routed experts; or a function
   * of the whole path. Default: those of all linear layers and experts but the output head.
   */
  readonly targets?: readonly string[] | ((path: string) => boolean)
  /** Source of A, of which each adapter takes a stream by its name. Default: that of seed 0. */
  readonly random?: Random
}

/** A weight with what stands beside it. */
export interface NamedAdapter extends NamedParameter {
  /** The matrices themselves, not copies. */
  readonly adapter: Adapter
}

/** What `addAdapters` has frozen, and whether it was trained before. */
const frozen = new WeakMap<Parameter, boolean>()

/** Whether the parameter belongs to a module that adapters stand beside: neither gradients nor balancers change it. */
export const isFrozen = (parameter: Parameter): boolean => frozen.has(parameter)

/**
 * Puts an adapter beside each of the chosen weights, B zero and A uniform in ±1/√K, so that the module computes what it did. Everything else is frozen, buffers such as a router's selection
 * bias included: what is learned belongs to this base. Weights may be stored in fewer bits, before or afterwards.
 *
 * Embeddings get none, nor does a head that shares its weight with one.
 * @throws MoeError E_CONFIG for a rank or α that cannot be, targets that are not there, a module that has adapters; E_OUT_OF_MEMORY, and nothing has changed
 */
export function addAdapters(module: Module, options: AdapterOptions = {}): void {
  checkOptions('addAdapters', options, { rank: true, alpha: true, targets: true, random: true })
  const { rank = 16, alpha = 32, targets, random = new Random(0) } = options
  if (!Number.isSafeInteger(rank) || rank < 1)
    throw refusal(`rank is ${rank}`, 'pass a whole number from 1, such as 16')
  if (!(Number.isFinite(alpha) && alpha > 0)) throw refusal(`alpha is ${alpha}`, 'pass a positive number, such as 32')
  if (namedAdapters(module).length > 0) {
    throw refusal('the module has adapters', 'fold them in with mergeAdapters first, or train those that there are')
  }
  const chosen = choose(module, targets)
  const make = ({ name, parameter }: NamedParameter) => ({
    parameter,
    adapter: makeAdapter(name, parameter, rank, alpha, random),
  })
  const made = allOrNothing(() => chosen.map(make))
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

/** The weights that can have an adapter, by name. */
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
  const there = [...new Set(weights.map(({ name }) => weightPath(name).split('.').at(-1)))].join(', ')
  if (weights.length === 0) {
    throw refusal(
      'the module has no weights that could be adapted',
      'give it linear layers, or name its own weights in `quantizable` and use them through linear() and groupedLinear()',
    )
  }
  if (targets === undefined) {
    const usual = weights.filter(({ isHead }) => !isHead)
    return usual.length > 0 ? usual : weights
  }
  if (typeof targets === 'function') {
    const wanted = weights.filter(({ name }) => targets(weightPath(name)))
    if (wanted.length === 0) throw refusal('targets chooses no weight', `choose among paths that end in ${there}`)
    return wanted
  }
  const isOf = (target: string) => (named: NamedParameter) => `.${weightPath(named.name)}`.endsWith(`.${target}`)
  const fix = `pass ends of paths of these: ${there}`
  if (!Array.isArray(targets) || targets.length === 0 || !targets.every(target => typeof target === 'string')) {
    throw refusal('targets is no list of names', fix)
  }
  const missing = targets.filter(target => !weights.some(isOf(target)))
  if (missing.length > 0) throw refusal(`no weight is called ${missing.join(', ')}`, fix)
  return weights.filter(named => targets.some(target => isOf(target)(named)))
}

/** The weights of a module that have an adapter, each once. */
export function namedAdapters(module: Module): NamedAdapter[] {
  return namedParameters(module).flatMap(named => {
    const { adapter } = named.parameter
    return adapter === null ? [] : [{ ...named, adapter }]
  })
}

/**
 * Adds what the adapters have learned to the weights beside which they stand, and removes them: the module then is one without, and what was frozen is trained again. Weights in fewer bits
 * are rounded anew, which in 4 bits may lose much of it: put the adapters beside the weights in f32 for that.
 * The event loop goes on meanwhile; leave the module alone until it is done.
 */
export async function mergeAdapters(module: Module): Promise<void> {
  const paced = pacer()
  for (const { parameter } of namedAdapters(module)) {
    if (parameter instanceof QuantizedParameter) await mergeStored(parameter)
    else parameter.assign(noGrad(() => keep(scope(() => denseWeight(parameter)))))
    detachAdapter(parameter)
    await paced()
  }
  thaw(module)
}

/** Rows of the first axis at a time, so that a large stack is never there as a whole in f32. */
async function mergeStored(parameter: QuantizedParameter): Promise<void> {
  const { weight, adapter } = parameter
  const { down, up, scale } = adapter as Adapter
  const [count] = weight.shape
  const stacked = weight.shape.length === 3
  const rows = stacked
    ? rowsAtOnce(weight.shape)
    : Math.ceil(rowsAtOnce(weight.shape) / weight.block[0]) * weight.block[0]
  const part = (i: number): Tensor => {
    const [from, to] = [i * rows, Math.min(count, (i + 1) * rows)]
    const ofDown = () => (stacked ? down.narrow(0, from, to) : down)
    const merged = () => {
      const product = up.narrow(0, from, to).mul(scale).matmul(ofDown(), { precision: 'f32' })
      return dequantizeWeight(storedRows(weight, from, to)).add(product)
    }
    return keep(scope(() => noGrad(merged)))
  }
  await parameter.assignParts(Math.ceil(count / rows), part)
}

/** Takes the adapters off and gives up what they have learned: the module is as it was before `addAdapters`. */
export function removeAdapters(module: Module): void {
  for (const { parameter } of namedAdapters(module)) detachAdapter(parameter)
  thaw(module)
}

function detachAdapter(parameter: Parameter): void {
  const { down, up } = parameter.adapter as Adapter
  parameter.adapter = null
  // `weightVersion` never comes back to a number that it had.
  parameter.version += down.version + up.version + 1
  down.dispose()
  up.dispose()
}

function thaw(module: Module): void {
  for (const { parameter } of namedParameters(module)) {
    if (frozen.get(parameter) === true) parameter.trainable = true
    frozen.delete(parameter)
  }
}

function refusal(problem: string, fix: string): MoeError {
  return new MoeError({ code: 'E_CONFIG', op: 'addAdapters', problem, fix })
}
