/** @file Merged schemas compared with ajv. */
import { Random } from '@moe/core'
import { Ajv2020 } from 'ajv/dist/2020.js'
import { expect, test } from 'vitest'
import { z } from 'zod'
import { allOf } from './all-of.ts'
import { supportedSchema } from './json-schema.ts'

const ajv = new Ajv2020({ strict: false })
const merged = (schema: unknown) =>
  allOf([schema], {
    resolve: () => ({ type: 'object', required: ['a'] }),
    withoutAnnotations: ({ title: _, ...rest }) => rest,
  })

/** Merges `allOf` at all depths. */
function mergedDeeply(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(mergedDeeply)
  if (typeof value !== 'object' || value === null) return value
  const own = 'allOf' in value ? merged(value) : value
  return Object.fromEntries(Object.entries(own).map(([key, one]) => [key, mergedDeeply(one)]))
}

test('a merged schema allows only values that all schemas allow, for random schemas', () => {
  const random = new Random(3)
  const pick = <T>(all: readonly T[]): T => all[random.integer(all.length)]
  const some = <T>(all: readonly T[]): T[] => all.filter(() => random.next() < 0.5)
  const schemaOf = (depth: number): object => {
    const kinds: Array<() => object> = [
      () => ({ type: pick(['integer', 'number', ['integer', 'string'], ['number', 'null']]) }),
      () => ({ minimum: random.integer(4), title: pick(['x', 'y']) }),
      () => ({ exclusiveMaximum: 2 + random.integer(4) }),
      () => ({ type: 'string', minLength: random.integer(2), pattern: pick(['^a', 'b']) }),
      () => ({ type: 'string', maxLength: 1 + random.integer(2), pattern: pick(['a', 'b$']) }),
      () => ({ enum: [2, ...some([1, 'a', 'ab', null, 3])] }),
      () => ({ const: pick([1, 'a', null]) }),
    ]
    const deeper: Array<() => object> = [
      () => ({
        type: 'object',
        properties: Object.fromEntries(some(['a', 'b', 'c']).map(name => [name, schemaOf(depth + 1)])),
        required: some(['a', 'b']),
        ...pick([{}, {}, { additionalProperties: false }, { additionalProperties: schemaOf(depth + 1) }]),
      }),
      () => ({ $ref: '#/$defs/named' }),
      () => ({ type: 'array', items: schemaOf(depth + 1), ...pick([{ minItems: 1 }, { maxItems: 1 }]) }),
      () => ({ [pick(['anyOf', 'oneOf'])]: [schemaOf(depth + 1), schemaOf(depth + 1)] }),
      () => ({ allOf: [schemaOf(depth + 1), schemaOf(depth + 1)] }),
    ]
    return pick(depth > 1 ? kinds : [...kinds, ...deeper, ...deeper])()
  }
  const values: unknown[] = [null, 0, 1, 2, 2.5, 3, 4, 5, '', 'a', 'b', 'ab', 'ba', 'abb', {}, [], [1], ['a', 'ab']]
  const one = () => pick(values)
  for (let i = 0; i < 60; i++) values.push(Object.fromEntries(some(['a', 'b', 'c', 'd']).map(name => [name, one()])))
  const $defs = { named: { type: 'object', required: ['a'] } }
  let [allowed, rejected] = [0, 0]
  for (let i = 0; i < 600; i++) {
    const given = { allOf: [schemaOf(0), schemaOf(0)], ...(random.next() < 0.3 && { minProperties: 0 }) }
    let own: object
    try {
      own = mergedDeeply(given) as object
    } catch {
      continue
    }
    // A merged schema may have several patterns.
    const text = JSON.stringify(own, (key, value) =>
      key === 'pattern' && Array.isArray(value) ? value.map(p => `(?=.*(?:${p}))`).join('') : value,
    )
    const [all, single] = [
      { ...given, $defs },
      { ...JSON.parse(text), $defs },
    ].map(schema => ajv.compile(schema))
    for (const value of values) {
      if (!single(value)) {
        rejected++
        continue
      }
      allowed++
      // oneOf is treated as anyOf.
      if (!JSON.stringify(given).includes('oneOf'))
        expect(all(value), `${JSON.stringify(given)} ${JSON.stringify(value)}`).toBe(true)
    }
  }
  expect(Math.min(allowed, rejected)).toBeGreaterThan(500)
})

test.each<[unknown, unknown]>([
  [
    {
      allOf: [
        { type: 'number', minimum: 1 },
        { type: 'integer', minimum: 3, maximum: 9 },
      ],
    },
    { type: ['integer'], minimum: 3, maximum: 9 },
  ],
  [
    { type: 'string', allOf: [{ pattern: 'a' }, { pattern: 'b' }] },
    { type: 'string', pattern: ['a', 'b'] },
  ],
  [
    { properties: { a: {} }, allOf: [{ properties: { b: true }, additionalProperties: false }] },
    { properties: { b: {} }, additionalProperties: false },
  ],
  [
    { $ref: 'x', required: ['b'] },
    { type: 'object', required: ['b', 'a'] },
  ],
  [
    { required: ['a'], anyOf: [{ type: 'object' }, { required: ['b'] }] },
    { anyOf: [{ required: ['a'], type: 'object' }, { required: ['a', 'b'] }] },
  ],
])('%j is merged to %j', (schema, expected) => {
  const own = mergedDeeply(merged(schema))
  const validate = [own, expected].map(one =>
    JSON.stringify(one, (_, value) =>
      typeof value === 'object' && value && !Array.isArray(value)
        ? Object.fromEntries(Object.entries(value).sort())
        : Array.isArray(value)
          ? [...value].sort()
          : value,
    ),
  )
  expect(validate[0]).toBe(validate[1])
})

test("Zod's intersections and strings with several checks are supported", () => {
  const Named = z.object({ name: z.string().startsWith('a').endsWith('z') })
  const both = z.intersection(Named, z.object({ age: z.int().min(3) }))
  for (const io of ['input', 'output'] as const) {
    const { schema } = supportedSchema(z.toJSONSchema(both, { io }), 'schema')
    expect(Object.keys((schema as { properties: object }).properties)).toEqual(['name', 'age'])
    const validate = ajv.compile(z.toJSONSchema(both, { io }))
    expect([validate({ name: 'abz', age: 3 }), validate({ name: 'ab', age: 3 })]).toEqual([true, false])
  }
})
