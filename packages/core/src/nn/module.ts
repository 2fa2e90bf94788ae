/**
 * @file Modules: plain classes whose fields are parameters, other modules, or arrays of them. Field names are checkpoint keys.
 */
import { describe } from '../errors.ts'
import { attrError } from '../infer.ts'
import { Random } from '../random.ts'
import { Parameter } from './parameter.ts'

/**
 * A part of a model. Extend it and assign parameters and modules to fields: the path of fields is the checkpoint key
 * (`model.layers.3.self_attn.o_proj.weight`), so name fields as the checkpoint does. A field may also be a `Random` that the
 * module draws from: `train` keeps where it is. Private `#fields` are not visited.
 */
export abstract class Module {
  /** Children whose own name is left out of the keys below them. */
  declare readonly transparent?: readonly string[]
  /** Parameters whose first axis is stored as separate tensors: field to the key (below this module) of each slice. */
  declare readonly stacked?: Readonly<Record<string, (index: number) => string>>
  /** Parameters that `quantizeWeights` may store in fewer bits: this module uses them through `linear`, `groupedLinear` and `embeddingRows` alone. */
  declare readonly quantizable?: readonly string[]
}

/** A parameter with its place in the model. */
export interface NamedParameter {
  /** Key of the parameter as one tensor. */
  readonly name: string
  /** The tensor itself, not a copy. */
  readonly parameter: Parameter
  /** Keys under which its slices are stored, when it is stacked. */
  readonly slices?: readonly string[]
}

/** A stream of random numbers with its place in the model. */
export interface NamedStream {
  /** Path of fields from the module. */
  readonly name: string
  /** The generator itself, not a copy. */
  readonly random: Random
}

/**
 * Every parameter and buffer of a module in field order, adapters behind their weights. One that is shared appears once, under its first name.
 * @throws MoeError E_ATTR for what is no Module
 */
export function namedParameters(module: Module, prefix = ''): NamedParameter[] {
  return Array.from(leaves('namedParameters', module, prefix)).flatMap(({ name, value, slice }) => {
    if (!(value instanceof Parameter)) return []
    const { adapter } = value
    const weight = named(value, name, slice)
    if (adapter === null) return [weight]
    const beside = (parameter: Parameter, part: string) =>
      named(parameter, besideKey(name, part), slice && (i => besideKey(slice(i), part)))
    return [weight, beside(adapter.down, 'lora_A'), beside(adapter.up, 'lora_B')]
  })
}

function named(parameter: Parameter, name: string, slice: Leaf['slice']): NamedParameter {
  if (slice === undefined) return { name, parameter }
  return { name, parameter, slices: Array.from({ length: parameter.shape[0] }, (_, i) => slice(i)) }
}

/** What a weight belongs to: its key without `.weight`. */
export const weightPath = (key: string): string => key.replace(/(^|\.)weight$/, '')

/** Key of a matrix beside a weight, as PEFT has it. */
const besideKey = (key: string, part: string) => join(weightPath(key), `${part}.weight`)

/** The same for the random streams that a module draws from: with them, and its parameters, it goes on exactly. @throws MoeError E_ATTR for what is no Module */
export function namedStreams(module: Module, prefix = ''): NamedStream[] {
  return Array.from(leaves('namedStreams', module, prefix)).flatMap(({ name, value }) =>
    value instanceof Random ? [{ name, random: value }] : [],
  )
}

/** The trainable parameters of a module. */
export function trainable(module: Module): Parameter[] {
  return namedParameters(module)
    .map(({ parameter }) => parameter)
    .filter(parameter => parameter.trainable)
}

/** Number of elements of all trainable parameters. */
export function parameterCount(module: Module): number {
  return trainable(module).reduce((sum, parameter) => sum + parameter.size, 0)
}

/** Drops all gradients. */
export function zeroGrad(module: Module): void {
  for (const { parameter } of namedParameters(module)) parameter.zeroGrad()
}

/** Frees every parameter of a module. */
export function disposeModule(module: Module): void {
  for (const { parameter } of namedParameters(module)) parameter.dispose()
}

/** What a field holds, or an item of an array in one. */
interface Leaf {
  readonly name: string
  readonly value: object
  /** Key of each slice, when it is stacked. */
  readonly slice: ((index: number) => string) | undefined
}

/** All objects in a module and in those below it, each once; modules and arrays are gone into. */
function* leaves(op: string, module: Module, prefix: string): Generator<Leaf> {
  if (!(module instanceof Module)) {
    const fix = 'pass one that was awaited, of a class that extends Module of this copy of @moe/core'
    throw attrError(op, `the module is ${describe(module)}`, fix)
  }
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
