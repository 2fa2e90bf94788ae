/** @file `allOf` as one schema: of what all of its schemas allow, all or less. */

type JsonSchema = Readonly<Record<string, unknown>>

/** Why there is none. */
export class MergeError extends Error {}

/** How schemas are read. */
interface Reading {
  /** The schema of a `$ref`. */
  named(ref: string): unknown
  /** A schema without what says nothing. */
  bare(schema: JsonSchema): JsonSchema
}

/** @throws MergeError for what does not go together */
export function allOf(schemas: readonly unknown[], reading: Reading): JsonSchema {
  return schemas.flatMap(schema => flat(schema, reading, 0)).reduce(both, {})
}

const isObject = (value: unknown): value is JsonSchema =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

/** Without names and without `allOf`. */
function flat(schema: unknown, reading: Reading, depth: number): JsonSchema[] {
  if (schema === true) return []
  if (!isObject(schema)) throw new MergeError(schema === false ? 'it allows nothing' : 'expected an object')
  if (depth > 32) throw new MergeError('a schema of allOf has itself in it')
  const { $ref: ref, allOf: all, ...own } = reading.bare(schema)
  if (all !== undefined && !Array.isArray(all)) throw new MergeError('allOf is no list of schemas')
  const others = [...(ref === undefined ? [] : [reading.named(String(ref))]), ...(all ?? [])]
  return [own, ...others.flatMap(one => flat(one, reading, depth + 1))]
}

const together: Readonly<Record<string, (a: never, b: never) => unknown>> = {
  type: (a: string | string[], b: string | string[]) => {
    const [as, bs] = [[a].flat(), [b].flat()]
    const has = (all: readonly string[], type: string) =>
      all.includes(type) || (type === 'integer' && all.includes('number'))
    const types = [...new Set([...as, ...bs])].filter(type => has(as, type) && has(bs, type))
    if (types.length === 0) throw new MergeError(`nothing is of type ${as} and ${bs}`)
    return types
  },
  enum: (a: readonly unknown[], b: readonly unknown[]) => {
    const texts = new Set(b.map(value => JSON.stringify(value)))
    const values = a.filter(value => texts.has(JSON.stringify(value)))
    if (values.length === 0) throw new MergeError('no value is of all enums')
    return values
  },
  pattern: (a: string | string[], b: string | string[]) => [...new Set([a, b].flat())],
  required: (a: readonly string[], b: readonly string[]) => [...new Set([...a, ...b])],
  items: (a: unknown, b: unknown) => ({ allOf: [a, b] }),
  ...Object.fromEntries(['minimum', 'exclusiveMinimum', 'minLength', 'minItems'].map(key => [key, Math.max])),
  ...Object.fromEntries(['maximum', 'exclusiveMaximum', 'maxLength', 'maxItems'].map(key => [key, Math.min])),
}

function both(a: JsonSchema, b: JsonSchema): JsonSchema {
  for (const [one, other] of [
    [a, b],
    [b, a],
  ]) {
    const choice = ['anyOf', 'oneOf'].find(key => key in one)
    if (choice === undefined) continue
    const { [choice]: list, ...rest } = one
    if (!Array.isArray(list)) throw new MergeError(`${choice} is no list of schemas`)
    return { anyOf: list.map(schema => ({ allOf: [schema, rest, other] })) }
  }
  const [x, y] = [a, b].map(({ const: value, ...rest }) => (value === undefined ? rest : { ...rest, enum: [value] }))
  const merged: Record<string, unknown> = { ...x, ...y }
  for (const key of Object.keys(x)) {
    if (!(key in y) || JSON.stringify(x[key]) === JSON.stringify(y[key])) continue
    if (key === 'properties' || key === 'additionalProperties') continue
    if (!Object.hasOwn(together, key)) throw new MergeError(`${key} of several does not go together`)
    merged[key] = together[key](x[key] as never, y[key] as never)
  }
  return { ...merged, ...propertiesOf(x, y) }
}

function propertiesOf(a: JsonSchema, b: JsonSchema): JsonSchema {
  const [own, other] = [a, b].map(({ properties = {} }) => {
    if (isObject(properties)) return properties
    throw new MergeError('properties are no object')
  })
  const schemaOf = (of: JsonSchema, properties: JsonSchema, name: string) =>
    Object.hasOwn(properties, name) ? properties[name] : (of.additionalProperties ?? true)
  const names = [...new Set([...Object.keys(own), ...Object.keys(other)])]
  const properties = names.flatMap(name => {
    const schemas = [schemaOf(a, own, name), schemaOf(b, other, name)].filter(schema => schema !== true)
    // One that it must not have it need not have.
    if (schemas.includes(false)) return []
    return [[name, schemas.length === 1 ? schemas[0] : { allOf: schemas }] as const]
  })
  const others = [a, b].flatMap(({ additionalProperties: schema }) =>
    schema === undefined || schema === true ? [] : schema,
  )
  return {
    ...('properties' in a || 'properties' in b ? { properties: Object.fromEntries(properties) } : {}),
    ...(others.length > 0 && { additionalProperties: others.includes(false) ? false : { allOf: others } }),
  }
}
