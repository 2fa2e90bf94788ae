/**
 * @file The supported subset of JSON Schema. Other keywords are rejected by name, because @mlc-ai/web-xgrammar silently ignores some of them, and crashes for others.
 */
import { randomUUID } from 'node:crypto'
import { allOf, MergeError } from './all-of.ts'
import {
  type Automaton,
  compileCost,
  Effort,
  intersect,
  ofLength,
  PatternError,
  type Rule,
  ruleOf,
  ruleOfTexts,
} from './automaton.ts'
import { ApiError } from './errors.ts'
import { formats, patternFormats } from './formats.ts'
import { type Bounds, numberRange } from './number-range.ts'
import { patternAutomaton } from './pattern.ts'

type JsonSchema = { readonly [keyword: string]: unknown }

/** A schema that can be compiled to a grammar. */
export interface SupportedSchema {
  readonly schema: JsonSchema
  /** Grammar rules for parts that @mlc-ai/web-xgrammar compiles incorrectly, by the constant string that represents each in the schema. */
  readonly rules: Readonly<Record<string, Rule>>
  /**
   * Compilation cost: the number of characters of strings with length limits, since grammars count them one by one. Equal limits count once, each up to 256 characters.
   */
  readonly characters: number
}

/** Prefix of the constants that represent rules. */
const placeholder = randomUUID()

/** Beginning of the references to definitions. */
const DEFINITIONS = '#/$defs/'

/** Limits of one schema; larger ones would block the server for seconds. */
const MAX_SCHEMAS = 300
const MAX_JSON = 2 ** 16
const MAX_DEPTH = 32
const MAX_STATES = 3000
const MAX_IGNORED = 20

/** Maximum number of characters for which a grammar has a rule each; beyond that, it uses a counter. */
const MAX_UNROLLED = 256

/** Maximum number of characters or items; the library counts in 32 bits. */
const MAX_COUNT = 2 ** 20
const isCountOf = (value: unknown) =>
  Number.isInteger(value) && (value as number) >= 0 && (value as number) <= MAX_COUNT

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
 * Converts a schema for compilation. The result allows only values that the schema allows, with two differences: objects with `properties` have no other properties, and
 * `oneOf` is treated as `anyOf`.
 * @param param the request field that contains the schema
 * @param effort limits the time for the patterns of all schemas of a request
 * @throws ApiError 400 if something in the schema is not supported
 */
export function supportedSchema(schema: unknown, param: string, effort = new Effort()): SupportedSchema {
  const text = JSON.stringify(schema) ?? ''
  const known = latest.get(text)
  if (known) return known
  const reader = new Reader(param, effort)
  const form = reader.root(schema)
  const supported = { schema: form, rules: reader.rules, characters: reader.characters }
  latest.set(text, supported)
  const [oldest] = latest.keys()
  if (latest.size > MAX_LATEST) latest.delete(oldest)
  return supported
}

/** The latest schemas by their JSON, since clients often repeat them. */
const latest = new Map<string, SupportedSchema>()
const MAX_LATEST = 64

const formatAutomata = new Map<string, Automaton>()

/** Formats are converted once, so that they need no effort of a request. */
function formatAutomaton(name: string): Automaton {
  const automaton = formatAutomata.get(name) ?? patternAutomaton(`^(?:${formats[name]})$`, new Effort())
  formatAutomata.set(name, automaton)
  return automaton
}

class Reader {
  readonly rules: Record<string, Rule> = {}
  /** Cost in characters, by what causes it. */
  readonly #costs = new Map<string, number>()
  readonly #automata = new Map<string, JsonSchema>()
  readonly #effort: Effort
  readonly #param: string
  #count = 0
  #states = 0
  /** Number of unsupported patterns beside formats. */
  #ignored = 0
  /** The given root and definitions, by the `$ref` that refers to them. */
  #definitions: ReadonlyMap<string, unknown> = new Map()
  /** The `$ref` in the result of each definition that is needed, by that in the given schema, or by the JSON of a merged schema that contains itself. */
  readonly #references = new Map([['#', '#']])
  /** The needed definitions, by their `$ref` in the result. */
  readonly #converted = new Map<string, { readonly schema: JsonSchema; readonly at: string }>()
  /** The schemas that are being merged, as JSON. */
  readonly #merging = new Set<string>()

  constructor(param: string, effort: Effort) {
    this.#param = param
    this.#effort = effort
  }

  get characters(): number {
    let sum = 0
    for (const characters of this.#costs.values()) sum += characters
    return sum
  }

  root(given: unknown): JsonSchema {
    const schema = this.#object(given, '#')
    if (JSON.stringify(schema).length > MAX_JSON) throw this.#error('#', `the schema is longer than ${MAX_JSON}`)
    const { $defs, definitions, ...rest } = schema
    const named = Object.entries({ $defs, definitions }).flatMap(([key, of]) =>
      of === undefined
        ? []
        : Object.entries(this.#object(of, `#/${key}`)).map(([name, one]) => [`#/${key}/${name}`, one] as const),
    )
    this.#definitions = new Map([['#', rest], ...named])
    // Converting one may add others.
    for (const [at, ref] of this.#references) {
      const one = this.#definitions.get(at)
      if (one !== undefined) this.#converted.set(ref, { schema: this.#schema(one, at, 0), at })
    }
    this.#checkEnds()
    const { '#': root, ...others } = Object.fromEntries([...this.#converted].map(([ref, { schema }]) => [ref, schema]))
    const entries = Object.entries(others).map(([ref, one]) => [ref.slice(DEFINITIONS.length), one])
    return { ...root, ...(entries.length > 0 && { $defs: Object.fromEntries(entries) }) }
  }

  /** The `$ref` in the result. Given names may contain characters that the library cannot read. */
  #reference(key: string): string {
    const ref = this.#references.get(key) ?? `${DEFINITIONS}${this.#references.size}`
    this.#references.set(key, ref)
    return ref
  }

  /** @throws ApiError if the values of a definition cannot end, since each contains another one */
  #checkEnds(): void {
    const ending = new Set<string>()
    for (let known = -1; known < ending.size; ) {
      known = ending.size
      for (const [ref, { schema }] of this.#converted) if (canEnd(schema, ending)) ending.add(ref)
    }
    const endless = [...this.#converted].findLast(([ref]) => !ending.has(ref))
    if (endless)
      throw this.#error(endless[1].at, 'values cannot end, since each requires another one: make it optional')
  }

  #schema(given: unknown, at: string, depth: number): JsonSchema {
    this.#countSchema(at)
    if (depth > MAX_DEPTH) throw this.#error(at, `the schema is nested deeper than ${MAX_DEPTH} levels`)
    if (given === true) return {}
    const schema = withoutAnnotations(this.#object(given, at))
    const keys = Object.keys(schema)
    const only = (...known: readonly string[]) => {
      const other = keys.find(key => !known.includes(key))
      if (other !== undefined) throw this.#error(at, `${other} is not supported${keys.length > 1 ? ' here' : ''}`)
    }
    const { $ref: ref, anyOf, oneOf, type } = schema
    const list = anyOf ?? oneOf
    if ('allOf' in schema || (keys.length > 1 && (ref !== undefined || list !== undefined))) {
      return this.#mergedSchema(schema, at, depth)
    }
    if (ref !== undefined) return { $ref: this.#reference(this.#path(String(ref), at)) }
    if (list !== undefined) {
      if (!Array.isArray(list) || list.length === 0)
        throw this.#error(at, `${keys[0]} is not a non-empty list of schemas`)
      const all = list.map((one, i) => this.#schema(one, `${at}/${keys[0]}/${i}`, depth + 1))
      return all.length === 1 ? all[0] : { anyOf: all }
    }
    const types = type === undefined ? this.#impliedTypes(keys) : [type].flat()
    const unknown = types?.find(name => !Object.hasOwn(keywordsOf, String(name)))
    if (unknown !== undefined) throw this.#error(at, `unknown type ${JSON.stringify(unknown)}`)
    if ('const' in schema || 'enum' in schema) {
      only('const' in schema ? 'const' : 'enum', 'type')
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
    const one = types.map(name => this.#ofType(String(name), schema, at, depth))
    return one.length === 1 ? one[0] : { anyOf: one }
  }

  /** The key in `#definitions` of a given `$ref`, which is a URI or, as Zod writes it, has no escapes. */
  #path(ref: string, at: string): string {
    const path = [unescaped(ref), ref].find(one => this.#definitions.has(one))
    if (path !== undefined) return path
    throw this.#error(at, `$ref is ${JSON.stringify(ref)}, expected a schema in $defs`)
  }

  /** Merges and converts a schema. If it contains itself, it becomes a definition. */
  #mergedSchema(schema: JsonSchema, at: string, depth: number): JsonSchema {
    const key = JSON.stringify(schema)
    if (this.#merging.has(key)) return { $ref: this.#reference(key) }
    this.#merging.add(key)
    const merged = this.#schema(this.#merged(schema, at), at, depth + 1)
    this.#merging.delete(key)
    const ref = this.#references.get(key)
    if (ref === undefined) return merged
    this.#converted.set(ref, { schema: merged, at })
    return { $ref: ref }
  }

  #merged(schema: JsonSchema, at: string): JsonSchema {
    const resolve = (ref: string) => {
      this.#countSchema(at)
      return this.#definitions.get(this.#path(ref, at))
    }
    try {
      return allOf([schema], { resolve, withoutAnnotations })
    } catch (cause) {
      if (!(cause instanceof MergeError)) throw cause
      throw this.#error(at, cause.message)
    }
  }

  /** Counts a schema. @throws ApiError if there are too many */
  #countSchema(at: string): void {
    if (++this.#count > MAX_SCHEMAS) throw this.#error(at, `the schema contains more than ${MAX_SCHEMAS} schemas`)
  }

  #impliedTypes(keys: readonly string[]): string[] | undefined {
    const implied = ['object', 'array'].find(name => keys.some(key => keywordsOf[name].includes(key)))
    return implied === undefined ? undefined : [implied]
  }

  #values(schema: Readonly<Record<string, unknown>>, types: readonly string[] | undefined, at: string): unknown[] {
    const given = 'const' in schema ? [schema.const] : schema.enum
    if (!Array.isArray(given)) throw this.#error(at, 'enum is not a list')
    const values = given.filter(value => types === undefined || types.some(type => isOf(type, value)))
    if (values.length === 0) throw this.#error(at, 'enum and type allow no value')
    return values
  }

  #ofType(type: string, schema: Readonly<Record<string, unknown>>, at: string, depth: number): JsonSchema {
    const own = Object.fromEntries(keywordsOf[type].flatMap(key => (key in schema ? [[key, schema[key]]] : [])))
    for (const [key, value] of Object.entries(own)) {
      if (!/^(min|max|exclusive)/.test(key)) continue
      const isCount = /(Length|Items)$/.test(key)
      if (isCount ? isCountOf(value) : Number.isFinite(value)) continue
      throw this.#error(
        at,
        `${key} is ${JSON.stringify(value)}, expected ${isCount ? `an integer from 0 to ${MAX_COUNT}` : 'a number'}`,
      )
    }
    if (type === 'object') return this.#objects(own, at, depth)
    if (type === 'array') return this.#arrays(own, at, depth)
    this.#checkOrder(own.minLength, own.maxLength, at)
    if ('format' in own || 'pattern' in own) return this.#string(own, at)
    const { minLength: least = 0, maxLength: most = least } = own
    if (type === 'string') this.#costs.set(`${least} ${own.maxLength}`, Math.min(most as number, MAX_UNROLLED))
    if (type === 'string' || Object.keys(own).length === 0) return { type, ...own }
    const range = numberRange(type as 'integer' | 'number', own as Bounds)
    if (range === undefined) throw this.#error(at, 'no number is within the bounds')
    return this.#automaton([range], 'bounds', at, () => this.#pattern(`^(?:${range})$`))
  }

  /** Strings that match a format, patterns and length limits. */
  #string({ format, pattern, minLength, maxLength }: Readonly<Record<string, unknown>>, at: string): JsonSchema {
    const patterns = [pattern ?? []].flat()
    const name = pattern !== undefined && patternFormats.has(String(format)) ? undefined : format
    if (name !== undefined && !Object.hasOwn(formats, String(name))) {
      const known = Object.keys(formats).join(', ')
      throw this.#error(at, `format ${JSON.stringify(name)} is not supported, expected one of ${known}`)
    }
    if (!patterns.every(one => typeof one === 'string')) throw this.#error(at, 'pattern is not a string')
    const subject = pattern === undefined ? 'format' : `pattern ${JSON.stringify(pattern).slice(0, 100)}`
    return this.#automaton([name, pattern, minLength, maxLength], subject, at, () => {
      const all: Automaton[] = name === undefined ? [] : [formatAutomaton(String(name))]
      // Beside a format, Zod writes an equivalent or weaker pattern, which may be unsupported and can then be ignored.
      const kept = name === undefined ? patterns : patterns.filter(one => this.#isSupported(one))
      all.push(...kept.map(one => this.#pattern(one)))
      if (minLength !== undefined || maxLength !== undefined) {
        const lengths = { least: (minLength ?? 0) as number, most: (maxLength ?? Infinity) as number }
        all.push(ofLength(lengths, this.#effort))
      }
      return all.reduce((a, b) => intersect(a, b, this.#effort))
    })
  }

  #pattern(source: string): Automaton {
    return patternAutomaton(source, this.#effort)
  }

  /** @throws PatternError if too many patterns are not supported, since finding out takes time */
  #isSupported(pattern: string): boolean {
    try {
      return this.#pattern(pattern).ends.length > 0
    } catch {
      if (++this.#ignored > MAX_IGNORED) throw new PatternError(`more than ${MAX_IGNORED} patterns are not supported`)
      return false
    }
  }

  /** A rule for an automaton over strings, or over numbers if `key` has one element. Built once per key. */
  #automaton(key: readonly unknown[], subject: string, at: string, make: () => Automaton): JsonSchema {
    const known = this.#automata.get(JSON.stringify(key))
    if (known) return known
    try {
      const automaton = make()
      this.#states += automaton.next.length
      if (this.#states > MAX_STATES)
        throw new PatternError('the patterns and bounds of the schema need too many states')
      const isString = key.length > 1
      const schema = this.#rule(name => ruleOf(automaton, isString, name))
      this.#costs.set(JSON.stringify(key), Math.ceil(compileCost(automaton)))
      this.#automata.set(JSON.stringify(key), schema)
      return schema
    } catch (cause) {
      if (!(cause instanceof PatternError)) throw cause
      throw this.#error(at, `${subject}: ${cause.message}`)
    }
  }

  #rule(make: (name: string) => Rule): JsonSchema {
    const number = Object.keys(this.rules).length
    const name = `${placeholder} ${number}`
    this.rules[name] = make(`own_${number}`)
    return { const: name }
  }

  #objects(own: Readonly<Record<string, unknown>>, at: string, depth: number): JsonSchema {
    const given = Object.entries(this.#object(own.properties ?? {}, `${at}/properties`))
    // The library does not escape property names.
    const unescaped = given.find(([name]) => JSON.stringify(name) !== `"${name}"`)
    if (unescaped)
      throw this.#error(
        at,
        `the property name ${JSON.stringify(unescaped[0])} contains quotes, backslashes or control characters`,
      )
    const properties = given.map(([name, one]) => [name, this.#schema(one, `${at}/properties/${name}`, depth + 1)])
    const required = own.required ?? []
    if (!Array.isArray(required)) throw this.#error(at, 'required is not a list')
    const missing = required.find(name => !given.some(([known]) => known === name))
    if (missing !== undefined)
      throw this.#error(at, `required contains ${JSON.stringify(missing)}, which is not in properties`)
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
      if (!Array.isArray(prefixItems)) throw this.#error(at, 'prefixItems is not a list')
      const { length } = prefixItems
      if ((minItems as number) > length || ((maxItems ?? length) as number) < length) {
        throw this.#error(at, 'minItems and maxItems must allow exactly as many items as prefixItems has')
      }
      const all = prefixItems.map((one, i) => this.#schema(one, `${at}/prefixItems/${i}`, depth + 1))
      return { type: 'array', prefixItems: all, items: false }
    }
    this.#checkOrder(minItems, maxItems, at)
    const bounds = { ...('minItems' in own && { minItems }), ...('maxItems' in own && { maxItems }) }
    if (items === false) return { enum: [[]] }
    return { type: 'array', items: this.#schema(items, `${at}/items`, depth + 1), ...bounds }
  }

  #checkOrder(least: unknown, most: unknown, at: string): void {
    if (least === undefined || most === undefined || (least as number) <= (most as number)) return
    throw this.#error(at, `the minimum ${least} is greater than the maximum ${most}`)
  }

  #object(given: unknown, at: string): Readonly<Record<string, unknown>> {
    if (typeof given === 'object' && given !== null && !Array.isArray(given)) return given as Record<string, unknown>
    throw this.#error(at, given === false ? 'the schema allows no value' : 'expected an object')
  }

  #error(at: string, problem: string): ApiError {
    return new ApiError(400, `${this.#param}: ${problem} (at ${at.slice(0, 200)})`, { param: this.#param })
  }
}

/** A `$ref` without the escapes of URIs and JSON pointers. */
function unescaped(ref: string): string {
  try {
    return decodeURIComponent(ref).replaceAll('~1', '/').replaceAll('~0', '~')
  } catch {
    return ref
  }
}

/** Whether a converted schema allows a value of finite length, if the definitions in `ending` do. */
function canEnd(schema: JsonSchema, ending: ReadonlySet<string>): boolean {
  const { $ref, anyOf, prefixItems, items, minItems = 0, properties, required = [] } = schema
  const ends = (one: unknown) => canEnd(one as JsonSchema, ending)
  if ($ref !== undefined) return ending.has($ref as string)
  if (anyOf !== undefined) return (anyOf as readonly unknown[]).some(ends)
  if (prefixItems !== undefined) return (prefixItems as readonly unknown[]).every(ends)
  if ((minItems as number) > 0) return ends(items)
  return (required as readonly string[]).every(name => ends((properties as JsonSchema)[name]))
}

/** A schema without keywords that do not affect which values it allows. */
const withoutAnnotations = (schema: JsonSchema): JsonSchema =>
  Object.fromEntries(Object.entries(schema).filter(([key, value]) => !annotations.has(key) && !isAnyName(key, value)))

/** The `propertyNames` that Zod writes, which allows any name. */
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
