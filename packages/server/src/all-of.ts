/** @file Merges the schemas of `allOf` into one that allows only values that all of them allow, but possibly not all such values. */

type JsonSchema = Readonly<Record<string, unknown>>

/** Thrown if schemas cannot be merged. */
export class MergeError extends Error {}

/** Access to the document that the schemas are part of. */
interface SchemaContext {
  /** Returns the schema that a `$ref` refers to. */
  resolve(ref: string): unknown
  /** Returns a schema without annotations. */
  withoutAnnotations(schema: JsonSchema): JsonSchema
}

/** Maximum number of schemas to merge into one, since the time grows with its square. */
const MAX_MERGED = 100

/** Merges schemas into one. @throws MergeError if they are contradictory, too many, or contain keywords that cannot be merged */
export function allOf(schemas: readonly unknown[], context: SchemaContext): JsonSchema {
  const all = schemas.flatMap(schema => flatten(schema, context, 0))
  if (all.length > MAX_MERGED) throw new MergeError(`allOf contains more than ${MAX_MERGED} schemas`)
  return all.reduce(merge, {})
}

const isObject = (value: unknown): value is JsonSchema =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

/** The schemas that a schema consists of, without `$ref` and `allOf`. */
function flatten(schema: unknown, context: SchemaContext, depth: number): JsonSchema[] {
  if (schema === true) return []
  if (!isObject(schema)) throw new MergeError(schema === false ? 'the schema allows no value' : 'expected an object')
  if (depth > 32) throw new MergeError('allOf is recursive')
  const { $ref: ref, allOf: all, ...own } = context.withoutAnnotations(schema)
  if (all !== undefined && !Array.isArray(all)) throw new MergeError('allOf is not a list of schemas')
  const others = [...(ref === undefined ? [] : [context.resolve(String(ref))]), ...(all ?? [])]
  return [own, ...others.flatMap(one => flatten(one, context, depth + 1))]
}

const mergeKeyword: Readonly<Record<string, (a: never, b: never) => unknown>> = {
  type: (a: string | string[], b: string | string[]) => {
    const [as, bs] = [[a].flat(), [b].flat()]
    const has = (all: readonly string[], type: string) =>
      all.includes(type) || (type === 'integer' && all.includes('number'))
    const types = [...new Set([...as, ...bs])].filter(type => has(as, type) && has(bs, type))
    if (types.length === 0) throw new MergeError(`no value has both type ${as} and type ${bs}`)
    return types
  },
  enum: (a: readonly unknown[], b: readonly unknown[]) => {
    if (!Array.isArray(a) || !Array.isArray(b)) throw new MergeError('enum is not a list')
    const texts = new Set(b.map(value => JSON.stringify(value)))
    const values = a.filter(value => texts.has(JSON.stringify(value)))
    if (values.length === 0) throw new MergeError('no value is in all enums')
    return values
  },
  pattern: (a: string | string[], b: string | string[]) => [...new Set([a, b].flat())],
  required: (a: readonly string[], b: readonly string[]) => {
    if (!Array.isArray(a) || !Array.isArray(b)) throw new MergeError('required is not a list')
    return [...new Set([...a, ...b])]
  },
  items: (a: unknown, b: unknown) => ({ allOf: [a, b] }),
  ...Object.fromEntries(['minimum', 'exclusiveMinimum', 'minLength', 'minItems'].map(key => [key, Math.max])),
  ...Object.fromEntries(['maximum', 'exclusiveMaximum', 'maxLength', 'maxItems'].map(key => [key, Math.min])),
}

function merge(a: JsonSchema, b: JsonSchema): JsonSchema {
  for (const [one, other] of [
    [a, b],
    [b, a],
  ]) {
    const choice = ['anyOf', 'oneOf'].find(key => key in one)
    if (choice === undefined) continue
    const { [choice]: list, ...rest } = one
    if (!Array.isArray(list)) throw new MergeError(`${choice} is not a list of schemas`)
    return { anyOf: list.map(schema => ({ allOf: [schema, rest, other] })) }
  }
  const [x, y] = [a, b].map(({ const: value, ...rest }) => {
    if (value === undefined) return rest
    if ('enum' in rest) throw new MergeError('enum beside const is not supported')
    return { ...rest, enum: [value] }
  })
  const merged: Record<string, unknown> = { ...x, ...y }
  for (const key of Object.keys(x)) {
    if (!(key in y) || JSON.stringify(x[key]) === JSON.stringify(y[key])) continue
    if (key === 'properties' || key === 'additionalProperties') continue
    if (!Object.hasOwn(mergeKeyword, key)) throw new MergeError(`several different values of ${key} cannot be merged`)
    merged[key] = mergeKeyword[key](x[key] as never, y[key] as never)
  }
  return { ...merged, ...mergeProperties(x, y) }
}

function mergeProperties(a: JsonSchema, b: JsonSchema): JsonSchema {
  const [own, other] = [a, b].map(({ properties = {} }) => {
    if (isObject(properties)) return properties
    throw new MergeError('properties is not an object')
  })
  const schemaOf = (of: JsonSchema, properties: JsonSchema, name: string) =>
    Object.hasOwn(properties, name) ? properties[name] : (of.additionalProperties ?? true)
  const names = [...new Set([...Object.keys(own), ...Object.keys(other)])]
  const properties = names.flatMap(name => {
    const schemas = [schemaOf(a, own, name), schemaOf(b, other, name)].filter(schema => schema !== true)
    // Omit a property that one of the schemas excludes.
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
