/**
 * @file The part of JSON Schema that answers can be held to. What is beyond it is refused by name: @mlc-ai/web-xgrammar would leave some of it out without a word, and
 * for some end its process.
 */
import { randomUUID } from 'node:crypto'
import { allOf, MergeError } from './all-of.ts'
import { type Automaton, both, ofLength, PatternError, type Rule, ruleOf, ruleOfTexts, weightOf } from './automaton.ts'
import { ApiError } from './errors.ts'
import { formats, patternFormats } from './formats.ts'
import { type Bounds, numberRange } from './number-range.ts'
import { patternAutomaton } from './pattern.ts'

type JsonSchema = { readonly [keyword: string]: unknown }

/** A schema for grammars. */
export interface SupportedSchema {
  readonly schema: JsonSchema
  /** What @mlc-ai/web-xgrammar gets wrong, by the constant texts that stand for it in the schema. */
  readonly rules: Readonly<Record<string, Rule>>
  /** Characters of texts of some length, which a grammar counts one by one, equal bounds once and of long texts the last ones. */
  readonly characters: number
}

const place = randomUUID()

/** Of one schema, and of its JSON: more would hold up the server for seconds. */
const MOST_SCHEMAS = 300
const MOST_JSON = 2 ** 16
const DEEPEST = 32
const MOST_STATES = 3000

/** Characters of a text that a grammar has one by one; beyond it counts. */
const MOST_WRITTEN_OUT = 256

/** Of characters or items; it counts in 32 bits. */
const MOST_COUNTED = 2 ** 20
const isCountOf = (value: unknown) =>
  Number.isInteger(value) && (value as number) >= 0 && (value as number) <= MOST_COUNTED

const annotations = new Set([
  'title',
  'description',
  'default',
  'examples',
  'deprecated',
  'readOnly',
  'writeOnly',
  '$schema',
  '$id',
  '$comment',
  'contentEncoding',
])

const keywordsOf: Readonly<Record<string, readonly string[]>> = {
  string: ['minLength', 'maxLength', 'format', 'pattern'],
  number: ['minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum'],
  integer: ['minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum'],
  array: ['items', 'prefixItems', 'minItems', 'maxItems'],
  object: ['properties', 'required', 'additionalProperties'],
  boolean: [],
  null: [],
}

/**
 * The schema in the form that a grammar is made of. What it allows the given one does; objects have the properties that are named and no others, and of `oneOf` any.
 * @param param field of the request that has it
 * @throws ApiError 400 for what is not supported
 */
export function supportedSchema(schema: unknown, param: string): SupportedSchema {
  const text = JSON.stringify(schema) ?? ''
  const known = latest.get(text)
  if (known) return known
  const reader = new Reader(param)
  const form = reader.root(schema)
  const supported = { schema: form, rules: reader.rules, characters: reader.characters }
  latest.set(text, supported)
  const [oldest] = latest.keys()
  if (latest.size > MOST_LATEST) latest.delete(oldest)
  return supported
}

/** What clients ask for they ask for again: by their JSON. */
const latest = new Map<string, SupportedSchema>()
const MOST_LATEST = 64

class Reader {
  readonly rules: Record<string, Rule> = {}
  /** By what counts them. */
  readonly #counted = new Map<string, number>()
  readonly #made = new Map<string, JsonSchema>()
  readonly #param: string
  #count = 0
  #states = 0
  #named: ReadonlyMap<string, unknown> = new Map()

  constructor(param: string) {
    this.#param = param
  }

  get characters(): number {
    let sum = 0
    for (const characters of this.#counted.values()) sum += characters
    return sum
  }

  root(given: unknown): JsonSchema {
    const schema = this.#object(given, '#')
    if (JSON.stringify(schema).length > MOST_JSON) throw this.#refuse('#', `it is longer than ${MOST_JSON}`)
    const { $defs, definitions, ...rest } = schema
    const named = { $defs, definitions }
    const all = Object.entries(named).flatMap(([key, of]) =>
      of === undefined
        ? []
        : Object.entries(this.#object(of, `#/${key}`)).map(([name, one]) => [key, name, one] as const),
    )
    this.#named = new Map([['#', rest], ...all.map(([key, name, one]) => [`#/${key}/${name}`, one] as const)])
    const result: Record<string, unknown> = { ...(this.#schema(rest, '#', 0) as object) }
    for (const [key, name, one] of all) {
      result[key] = { ...(result[key] as object), [name]: this.#schema(one, `#/${key}/${name}`, 0) }
    }
    return result
  }

  #schema(given: unknown, at: string, depth: number): JsonSchema {
    this.#another(at)
    if (depth > DEEPEST) throw this.#refuse(at, `it is deeper than ${DEEPEST}`)
    if (given === true) return {}
    const schema = bare(this.#object(given, at))
    const keys = Object.keys(schema)
    const only = (...known: readonly string[]) => {
      const other = keys.find(key => !known.includes(key))
      if (other !== undefined) throw this.#refuse(at, `${other} is not supported${keys.length > 1 ? ' here' : ''}`)
    }
    const { $ref: ref, anyOf, oneOf, type } = schema
    const list = anyOf ?? oneOf
    if ('allOf' in schema || (keys.length > 1 && (ref !== undefined || list !== undefined))) {
      return this.#schema(this.#merged(schema, at), at, depth + 1)
    }
    if (ref !== undefined) {
      this.#definition(String(ref), at)
      return { $ref: ref }
    }
    if (list !== undefined) {
      if (!Array.isArray(list) || list.length === 0) throw this.#refuse(at, `${keys[0]} is no list of schemas`)
      const all = list.map((one, i) => this.#schema(one, `${at}/${keys[0]}/${i}`, depth + 1))
      return all.length === 1 ? all[0] : { anyOf: all }
    }
    const types = type === undefined ? this.#impliedTypes(keys) : [type].flat()
    const unknown = types?.find(name => !Object.hasOwn(keywordsOf, String(name)))
    if (unknown !== undefined) throw this.#refuse(at, `type ${JSON.stringify(unknown)} is not known`)
    if ('const' in schema || 'enum' in schema) {
      only('const', 'enum', 'type')
      const values = this.#values(schema, types as string[] | undefined, at)
      return this.#rule(name =>
        ruleOfTexts(
          values.map(value => JSON.stringify(value)),
          name,
        ),
      )
    }
    if (types === undefined || types.length === 0) {
      only()
      return {}
    }
    only('type', ...types.flatMap(name => keywordsOf[String(name)]))
    const one = types.map(name => this.#typed(String(name), schema, at, depth))
    return one.length === 1 ? one[0] : { anyOf: one }
  }

  #definition(ref: string, at: string): unknown {
    if (this.#named.has(ref)) return this.#named.get(ref)
    throw this.#refuse(at, `$ref is ${JSON.stringify(ref)}, expected one of $defs`)
  }

  #merged(schema: JsonSchema, at: string): JsonSchema {
    const named = (ref: string) => {
      this.#another(at)
      return this.#definition(ref, at)
    }
    try {
      return allOf([schema], { named, bare })
    } catch (cause) {
      if (!(cause instanceof MergeError)) throw cause
      throw this.#refuse(at, cause.message)
    }
  }

  /** @throws ApiError where there are too many */
  #another(at: string): void {
    if (++this.#count > MOST_SCHEMAS) throw this.#refuse(at, `there are more than ${MOST_SCHEMAS} schemas in it`)
  }

  #impliedTypes(keys: readonly string[]): string[] | undefined {
    const implied = ['object', 'array'].find(name => keys.some(key => keywordsOf[name].includes(key)))
    return implied === undefined ? undefined : [implied]
  }

  #values(schema: Readonly<Record<string, unknown>>, types: readonly string[] | undefined, at: string): unknown[] {
    const given = 'const' in schema ? [schema.const] : schema.enum
    if (!Array.isArray(given)) throw this.#refuse(at, 'enum is no list')
    const values = given.filter(value => types === undefined || types.some(type => isOf(type, value)))
    if (values.length === 0) throw this.#refuse(at, 'no value is allowed')
    return values
  }

  #typed(type: string, schema: Readonly<Record<string, unknown>>, at: string, depth: number): JsonSchema {
    const own = Object.fromEntries(keywordsOf[type].flatMap(key => (key in schema ? [[key, schema[key]]] : [])))
    for (const [key, value] of Object.entries(own)) {
      if (!/^(min|max|exclusive)/.test(key)) continue
      const isCount = /(Length|Items)$/.test(key)
      if (isCount ? isCountOf(value) : Number.isFinite(value)) continue
      throw this.#refuse(at, `${key} is ${JSON.stringify(value)}`)
    }
    if (type === 'object') return this.#objects(own, at, depth)
    if (type === 'array') return this.#arrays(own, at, depth)
    this.#inOrder(own.minLength, own.maxLength, at)
    if ('format' in own || 'pattern' in own) return this.#text(own, at)
    const { minLength: least = 0, maxLength: most = least } = own
    if (type === 'string') this.#counted.set(`${least} ${own.maxLength}`, Math.min(most as number, MOST_WRITTEN_OUT))
    if (type === 'string' || Object.keys(own).length === 0) return { type, ...own }
    const range = numberRange(type as 'integer' | 'number', own as Bounds)
    if (range === undefined) throw this.#refuse(at, 'there is no whole number between its bounds')
    return this.#automaton([range], 'its bounds', at, () => patternAutomaton(`^(?:${range})$`))
  }

  /** Of a format, a pattern and lengths what is of all. */
  #text({ format, pattern, minLength, maxLength }: Readonly<Record<string, unknown>>, at: string): JsonSchema {
    const patterns = [pattern ?? []].flat()
    const name = pattern !== undefined && patternFormats.has(String(format)) ? undefined : format
    if (name !== undefined && !Object.hasOwn(formats, String(name))) {
      const known = Object.keys(formats).join(', ')
      throw this.#refuse(at, `format ${JSON.stringify(name)} is not supported, expected one of ${known}`)
    }
    if (!patterns.every(one => typeof one === 'string')) throw this.#refuse(at, 'pattern is no text')
    const said = pattern === undefined ? 'format' : `pattern ${JSON.stringify(pattern).slice(0, 100)}`
    return this.#automaton([name, pattern, minLength, maxLength], said, at, () => {
      const all: Automaton[] = name === undefined ? [] : [patternAutomaton(`^(?:${formats[String(name)]})$`)]
      // Zod writes patterns beside formats which say the same or less, also such as are not supported.
      const kept = name === undefined ? patterns : patterns.filter(isSupported)
      all.push(...kept.map(patternAutomaton))
      if (minLength !== undefined || maxLength !== undefined) {
        all.push(ofLength({ least: (minLength ?? 0) as number, most: (maxLength ?? Infinity) as number }))
      }
      return all.reduce(both)
    })
  }

  /** Of a text, or of a number, by what says all of it. Made once. */
  #automaton(key: readonly unknown[], said: string, at: string, make: () => Automaton): JsonSchema {
    const known = this.#made.get(JSON.stringify(key))
    if (known) return known
    try {
      const automaton = make()
      this.#states += automaton.next.length
      if (this.#states > MOST_STATES) throw new PatternError('there is too much of that in the schema')
      const isString = key.length > 1
      const schema = this.#rule(name => ruleOf(automaton, isString, name))
      this.#counted.set(JSON.stringify(key), Math.ceil(weightOf(automaton)))
      this.#made.set(JSON.stringify(key), schema)
      return schema
    } catch (cause) {
      if (!(cause instanceof PatternError)) throw cause
      throw this.#refuse(at, `${said}: ${cause.message}`)
    }
  }

  #rule(make: (name: string) => Rule): JsonSchema {
    const number = Object.keys(this.rules).length
    const name = `${place} ${number}`
    this.rules[name] = make(`own_${number}`)
    return { const: name }
  }

  #objects(own: Readonly<Record<string, unknown>>, at: string, depth: number): JsonSchema {
    const given = Object.entries(this.#object(own.properties ?? {}, `${at}/properties`))
    // It would write them as they are.
    const strange = given.find(([name]) => JSON.stringify(name) !== `"${name}"`)
    if (strange)
      throw this.#refuse(at, `the name ${JSON.stringify(strange[0])} has quotes, backslashes or control characters`)
    const properties = given.map(([name, one]) => [name, this.#schema(one, `${at}/properties/${name}`, depth + 1)])
    const required = own.required ?? []
    if (!Array.isArray(required)) throw this.#refuse(at, 'required is no list')
    const missing = required.find(name => !given.some(([known]) => known === name))
    if (missing !== undefined)
      throw this.#refuse(at, `required has ${JSON.stringify(missing)}, which properties has not`)
    if (given.length > 0) {
      return { type: 'object', properties: Object.fromEntries(properties), required, additionalProperties: false }
    }
    const { additionalProperties: others = !('properties' in own) } = own
    if (others === false) return { type: 'object', properties: {}, additionalProperties: false }
    return { type: 'object', additionalProperties: this.#schema(others, `${at}/additionalProperties`, depth + 1) }
  }

  #arrays(own: Readonly<Record<string, unknown>>, at: string, depth: number): JsonSchema {
    const { items = true, prefixItems, minItems = 0, maxItems } = own
    if (prefixItems !== undefined) {
      if (!Array.isArray(prefixItems)) throw this.#refuse(at, 'prefixItems is no list')
      const { length } = prefixItems
      if ((minItems as number) > length || ((maxItems ?? length) as number) < length) {
        throw this.#refuse(at, 'arrays with prefixItems have as many items')
      }
      const all = prefixItems.map((one, i) => this.#schema(one, `${at}/prefixItems/${i}`, depth + 1))
      return { type: 'array', prefixItems: all, items: false }
    }
    this.#inOrder(minItems, maxItems, at)
    const bounds = { ...('minItems' in own && { minItems }), ...('maxItems' in own && { maxItems }) }
    if (items === false) return { enum: [[]] }
    return { type: 'array', items: this.#schema(items, `${at}/items`, depth + 1), ...bounds }
  }

  #inOrder(least: unknown, most: unknown, at: string): void {
    if (least === undefined || most === undefined || (least as number) <= (most as number)) return
    throw this.#refuse(at, `nothing is from ${least} to ${most}`)
  }

  #object(given: unknown, at: string): Readonly<Record<string, unknown>> {
    if (typeof given === 'object' && given !== null && !Array.isArray(given)) return given as Record<string, unknown>
    throw this.#refuse(at, given === false ? 'it allows nothing' : 'expected an object')
  }

  #refuse(at: string, problem: string): ApiError {
    return new ApiError(400, `${this.#param}: ${problem} (at ${at.slice(0, 200)})`, { param: this.#param })
  }
}

function isSupported(pattern: string): boolean {
  try {
    return patternAutomaton(pattern).ends.length > 0
  } catch {
    return false
  }
}

/** A schema without what says nothing of what it allows. */
const bare = (schema: JsonSchema): JsonSchema =>
  Object.fromEntries(Object.entries(schema).filter(([key, value]) => !annotations.has(key) && !isAnyName(key, value)))

/** `propertyNames` as Zod writes it: that they are texts. */
const isAnyName = (key: string, value: unknown) =>
  key === 'propertyNames' && JSON.stringify(value) === '{"type":"string"}'

function isOf(type: string, value: unknown): boolean {
  if (type === 'null') return value === null
  if (type === 'array') return Array.isArray(value)
  if (type === 'object') return typeof value === 'object' && value !== null && !Array.isArray(value)
  if (type === 'integer') return Number.isInteger(value)
  const kind: string = typeof value
  return kind === type
}
