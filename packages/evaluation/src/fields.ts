/** @file Reads fields of items, which a task specifies by name, template or function. */
import { parse, Template, tokenize } from '@huggingface/jinja'
import { isMoeError, MoeError, shown } from '@moe/core'
import type { Field, Item, ListField } from './task.ts'

/** An item, and where it comes from. */
export interface PlacedItem {
  readonly fields: Item
  /** File and line, or `item 0` and so on. */
  readonly location: string
}

export const dataError = (location: string, problem: string, fix?: string, cause?: unknown): MoeError =>
  new MoeError({ code: 'E_DATA', op: location, problem, fix, cause })

/** Reads a field of an item. `name` below is the name of the field in the task. @throws MoeError E_DATA with the item's location */
export type Reader<T> = (item: PlacedItem) => T

/** Reads a text. */
export const textReader = (name: string, field: Field<string>): Reader<string> => {
  const read = reader(name, field)
  return item => asText(name, item, read(item))
}

/** Reads a text or a list of texts. */
export const textsReader = (
  name: string,
  field: ListField | Field<string | readonly string[]>,
): Reader<string | readonly string[]> => {
  const read = Array.isArray(field) ? () => field : reader(name, field as Field<unknown>)
  return item => {
    const value = read(item)
    return Array.isArray(value) ? asList(name, item, value) : asText(name, item, value)
  }
}

/** Reads a list of texts. */
export const listReader = (name: string, field: ListField): Reader<readonly string[]> => {
  const read = textsReader(name, field)
  return item => {
    const value = read(item)
    if (typeof value !== 'string') return value
    throw dataError(item.location, `${name} is ${shown(value)}, expected a list`)
  }
}

/** Reads a text or a number. */
export const answerReader = (name: string, field: Field<string | number>): Reader<string | number> => {
  const read = reader(name, field)
  return item => {
    const value = read(item)
    return typeof value === 'number' ? value : asText(name, item, value)
  }
}

function asText(name: string, { location }: PlacedItem, value: unknown): string {
  if (typeof value === 'string') return value
  if (typeof value === 'number') return String(value)
  throw dataError(location, `${name} is ${shown(value)}, expected a text`)
}

function asList(name: string, item: PlacedItem, value: readonly unknown[]): readonly string[] {
  if (value.length === 0) throw dataError(item.location, `${name} is an empty list`)
  return value.map((one, i) => asText(`${name}[${i}]`, item, one))
}

function reader(name: string, field: Field<unknown>): Reader<unknown> {
  if (typeof field === 'function') {
    return ({ fields, location }) => {
      try {
        return field(fields)
      } catch (error) {
        if (isMoeError(error) && error.op !== FIELD) throw error
        const problem = isMoeError(error) ? error.problem : (error as Error).message
        throw dataError(location, `${name}: ${problem}`, undefined, error)
      }
    }
  }
  if (typeof field !== 'string') {
    throw new MoeError({
      code: 'E_CONFIG',
      op: 'evaluateTask',
      problem: `${name} of the task is ${shown(field)}`,
      fix: 'pass the name of a field, a template such as "{{question}}", or a function of an item',
    })
  }
  return isTemplate(field) ? templateReader(name, field) : pathReader(name, field)
}

/** Whether a text contains a variable or a block of Jinja. */
export const isTemplate = (text: string): boolean => /\{\{|\{%/.test(text)

function pathReader(name: string, path: string): Reader<unknown> {
  const keys = path.split('.')
  return ({ fields, location }) => {
    let value: unknown = fields
    for (const key of keys) value = Object(value) === value ? (value as Item)[key] : undefined
    if (value !== undefined && value !== null) return value
    throw missingField(location, path, name, fields)
  }
}

function templateReader(name: string, source: string): Reader<unknown> {
  // A template that is one expression returns its value. In other templates, keep a final newline, which Jinja would drop.
  const [, expression] = /^\{\{((?:(?!\}\}|\{\{)[\s\S])*)\}\}$/.exec(source) ?? []
  let template: Template
  let names: ReadonlySet<string>
  try {
    template = new Template(expression === undefined ? '' : `{{ (${expression}) | tojson }}`)
    // Unlike its constructor, Jinja and lm-evaluation-harness keep white space around blocks.
    if (expression === undefined) template.parsed = parse(tokenize(source.replace(/\n$/, '\n\n')))
    names = freeNames(template.parsed)
  } catch (cause) {
    const problem = `${name} of the task is not a valid template: ${(cause as Error).message}`
    throw new MoeError({ code: 'E_CONFIG', op: 'evaluateTask', problem, cause })
  }
  return ({ fields, location }) => {
    for (const field of names) {
      if (fields[field] !== undefined && fields[field] !== null) continue
      throw missingField(location, field, name, fields)
    }
    try {
      const text = template.render({ ...fields })
      return expression === undefined ? text : JSON.parse(text)
    } catch (cause) {
      throw dataError(location, `${name}: ${(cause as Error).message}`, undefined, cause)
    }
  }
}

function missingField(location: string, field: string, name: string, fields: Item): MoeError {
  const problem = `the field ${field} is missing, which ${name} of the task uses`
  return dataError(location, problem, `the item has ${Object.keys(fields).join(', ')}`)
}

/** The variables of a template that it does not set itself, except those that it tests for existence. */
function freeNames(program: unknown): Set<string> {
  const used = new Set<string>()
  const own = new Set(['loop', 'range', 'namespace', 'true', 'false', 'none', 'True', 'False', 'None'])
  const visit = (node: unknown): void => {
    if (Array.isArray(node)) for (const one of node) visit(one)
    if (Array.isArray(node) || Object(node) !== node) return
    const { type, ...parts } = node as Readonly<Record<string, unknown>>
    if (type === 'Identifier') used.add(parts.value as string)
    else if (type === 'MemberExpression') visit([parts.object, parts.computed ? parts.property : null])
    else if (type === 'FilterExpression') visit([parts.operand, (parts.filter as { args?: unknown }).args])
    else if (type === 'KeywordArgumentExpression') visit(parts.value)
    else if (type === 'TestExpression') return
    else {
      for (const target of [parts.loopvar, parts.assignee]) {
        for (const { value } of [target ?? []].flat() as { value?: unknown }[]) own.add(value as string)
      }
      visit(Object.values(parts))
    }
  }
  visit(program)
  return new Set([...used].filter(name => !own.has(name)))
}

/** The `op` of errors of `fieldOf`, which `reader` replaces by the item's location. */
const FIELD = 'item'

/** Returns a field of an item that must be a text; for functions in tasks. @throws MoeError E_DATA */
export function fieldOf(item: Item, name: string): string {
  const value = item[name]
  if (typeof value === 'string') return value
  const problem = value === undefined ? `the field ${name} is missing` : `${name} is ${shown(value)}, expected a text`
  throw dataError(FIELD, problem, `the item has ${Object.keys(item).join(', ')}`)
}
