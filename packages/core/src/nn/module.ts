/**
 * @file Modules: plain classes whose fields are parameters, other modules, or arrays of them. Field names are checkpoint keys.
 */
import { describe } from '../errors.ts'
import { attrError } from '../infer.ts'
import { Parameter } from './parameter.ts'

/**
 * A part of a model. Extend it and assign parameters and modules to fields: the path of fields is the checkpoint key
 * (`model.layers.3.self_attn.o_proj.weight`), so name fields as the checkpoint does. Private `#fields` are not visited.
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
  readonly parameter: Parameter
  /** Keys under which its slices are stored, when it is stacked. */
  readonly slices?: readonly string[]
}

/** Every parameter and buffer of a module in field order. One that is shared appears once, under its first name. @throws MoeError E_ATTR for what is no Module */
export function namedParameters(module: Module, prefix = ''): NamedParameter[] {
  if (!(module instanceof Module)) {
    const fix = 'pass one that was awaited, of a class that extends Module of this copy of @moe/core'
    throw attrError('namedParameters', `the module is ${describe(module)}`, fix)
  }
  const found: NamedParameter[] = []
  visit(module, prefix, found, new Set())
  return found
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

function visit(module: Module, prefix: string, found: NamedParameter[], seen: Set<object>): void {
  if (seen.has(module)) return
  seen.add(module)
  for (const [field, value] of Object.entries(module)) {
    const inner = module.transparent?.includes(field) ? prefix : join(prefix, field)
    visitValue(module, field, value, inner, prefix, found, seen)
  }
}

function visitValue(
  module: Module,
  field: string,
  value: unknown,
  name: string,
  prefix: string,
  found: NamedParameter[],
  seen: Set<object>,
): void {
  if (value instanceof Parameter) {
    if (seen.has(value)) return
    seen.add(value)
    const key = module.stacked?.[field]
    if (key === undefined) found.push({ name, parameter: value })
    else {
      const slices = Array.from({ length: value.shape[0] }, (_, i) => join(prefix, key(i)))
      found.push({ name, parameter: value, slices })
    }
  } else if (value instanceof Module) {
    visit(value, name, found, seen)
  } else if (Array.isArray(value)) {
    for (const [i, item] of value.entries()) visitValue(module, field, item, join(name, String(i)), prefix, found, seen)
  }
}

const join = (prefix: string, name: string) => (prefix === '' ? name : `${prefix}.${name}`)
