/**
 * @file Modules: plain classes whose fields are parameters, other modules, or arrays of them. Field names are
 * checkpoint keys.
 */
import { attrError } from '../checks.ts'
import { describe } from '../errors.ts'
import { Parameter } from '../parameter.ts'
import { Random } from '../random.ts'

/**
 * Base class for parts of a model. Extend it and assign parameters and modules to fields. The path of fields is the
 * checkpoint key (`model.layers.3.self_attn.o_proj.weight`), so name fields as the checkpoint does. A field may also be
 * a `Random` that the module draws from; `train` saves and restores its position. Private `#fields` are not visited.
 */
export abstract class Module {
  /** Fields whose own name is left out of the keys below them. */
  declare readonly transparent?: readonly string[]
  /**
   * Parameters whose first axis is stored as separate tensors: maps the field to the key (below this module) of each
   * slice.
   */
  declare readonly stacked?: Readonly<Record<string, (index: number) => string>>
  /**
   * Parameters that `quantizeWeights` may quantize. The module must use them only through `linear`, `groupedLinear` or
   * an embedding lookup.
   */
  declare readonly quantizable?: readonly string[]
}

/** A parameter and its place in the model. */
export interface NamedParameter {
  /** Checkpoint key of the parameter as one tensor. */
  readonly name: string
  /** The parameter itself, not a copy. */
  readonly parameter: Parameter
  /** Checkpoint keys of its slices, if it is stacked. */
  readonly slices?: readonly string[]
}

/** A stream of random numbers and its place in the model. */
export interface NamedStream {
  /** Path of fields from the module. */
  readonly name: string
  /** The generator itself, not a copy. */
  readonly random: Random
}

/**
 * Returns every parameter and buffer of a module in field order, each adapter after its weight. A shared parameter
 * appears once, under its first name.
 * @throws MoeError E_ATTR if `module` is not a Module
 */
export function namedParameters(module: Module, prefix = ''): NamedParameter[] {
  return parametersOf('namedParameters', module, prefix)
}

/** `namedParameters` for other functions, whose name errors report. Internal. */
export function parametersOf(op: string, module: Module, prefix = ''): NamedParameter[] {
  return Array.from(leaves(op, module, prefix)).flatMap(({ name, value, slice }) => {
    if (!(value instanceof Parameter)) return []
    const { adapter } = value
    const weight = named(value, name, slice)
    if (adapter === null) return [weight]
    const matrix = (parameter: Parameter, part: string) =>
      named(parameter, adapterKey(name, part), slice && (i => adapterKey(slice(i), part)))
    return [weight, matrix(adapter.down, 'lora_A'), matrix(adapter.up, 'lora_B')]
  })
}

function named(parameter: Parameter, name: string, slice: Leaf['slice']): NamedParameter {
  if (slice === undefined) return { name, parameter }
  return { name, parameter, slices: Array.from({ length: parameter.shape[0] }, (_, i) => slice(i)) }
}

/** The key of a weight without `.weight`. */
export const weightPath = (key: string): string => key.replace(/(^|\.)weight$/, '')

/** Key of an adapter matrix, as in PEFT. */
const adapterKey = (key: string, part: string) => join(weightPath(key), `${part}.weight`)

/**
 * Returns the random streams that a module draws from. Together with its parameters, they determine how the module
 * continues.
 * @throws MoeError E_ATTR if `module` is not a Module
 */
export function namedStreams(module: Module, prefix = ''): NamedStream[] {
  return Array.from(leaves('namedStreams', module, prefix)).flatMap(({ name, value }) =>
    value instanceof Random ? [{ name, random: value }] : [],
  )
}

/** Returns the trainable parameters of a module. @throws MoeError E_ATTR if `module` is not a Module */
export function trainable(module: Module): Parameter[] {
  return trainableOf('trainable', module)
}

const trainableOf = (op: string, module: Module): Parameter[] =>
  parametersOf(op, module)
    .map(({ parameter }) => parameter)
    .filter(parameter => parameter.trainable)

/** Returns the number of elements of all trainable parameters. */
export function parameterCount(module: Module): number {
  return trainableOf('parameterCount', module).reduce((sum, parameter) => sum + parameter.size, 0)
}

/** Frees all gradients of a module. */
export function zeroGrad(module: Module): void {
  for (const { parameter } of parametersOf('zeroGrad', module)) parameter.zeroGrad()
}

/** Frees every parameter of a module. */
export function disposeModule(module: Module): void {
  for (const { parameter } of parametersOf('disposeModule', module)) parameter.dispose()
}

/** Checks that a caller passed a module. Internal. @throws MoeError E_ATTR */
export function needModule(op: string, module: Module): void {
  if (module instanceof Module) return
  const fix = 'pass an awaited instance of a class that extends Module from this copy of @moe/core'
  throw attrError(op, `the module is ${describe(module)}`, fix)
}

/** The value of a field, or an item of an array in one. */
interface Leaf {
  readonly name: string
  readonly value: object
  /** Returns the key of each slice, if it is stacked. */
  readonly slice: ((index: number) => string) | undefined
}

/** Yields all objects in a module and its descendants, each once. Descends into modules and arrays. */
function* leaves(op: string, module: Module, prefix: string): Generator<Leaf> {
  needModule(op, module)
  yield* visit({ name: prefix, value: module, slice: undefined }, new Set())
}

function* visit(leaf: Leaf, seen: Set<object>): Generator<Leaf> {
  const { name, value, slice } = leaf
  if (typeof value !== 'object' || value === null || seen.has(value)) return
  seen.add(value)
  if (Array.isArray(value)) {
    for (const [i, item] of value.entries()) yield* visit({ name: join(name, String(i)), value: item, slice }, seen)
  } else if (value instanceof Module) {
    for (const [field, held] of Object.entries(value)) {
      const key = value.stacked?.[field]
      const inner = value.transparent?.includes(field) ? name : join(name, field)
      yield* visit({ name: inner, value: held, slice: key && (i => join(name, key(i))) }, seen)
    }
  } else yield leaf
}

const join = (prefix: string, name: string) => (prefix === '' ? name : `${prefix}.${name}`)
