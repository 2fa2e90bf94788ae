/** @file Schemas as they are compiled, and those that are rejected. */
import { expect, test } from 'vitest'
import { supportedSchema } from './json-schema.ts'

const nested = (depth: number): object => (depth === 0 ? {} : { type: 'array', items: nested(depth - 1) })

test.each<[schema: unknown, converted: object]>([
  [{}, {}],
  [{ type: 'string', title: 'a', description: 'b', default: 'c', examples: [], $comment: 'd' }, { type: 'string' }],
  [{ type: 'object' }, { type: 'object', additionalProperties: {} }],
  [{ additionalProperties: { type: 'null' } }, { type: 'object', additionalProperties: { type: 'null' } }],
  [{ properties: {} }, { type: 'object', properties: {}, additionalProperties: false }],
  [
    { type: 'object', additionalProperties: false },
    { type: 'object', properties: {}, additionalProperties: false },
  ],
  [
    { properties: {}, additionalProperties: true },
    { type: 'object', additionalProperties: {} },
  ],
  [
    { properties: { a: true, b: {} }, required: ['b'], additionalProperties: { type: 'null' } },
    { type: 'object', properties: { a: {}, b: {} }, required: ['b'], additionalProperties: false },
  ],
  [{ type: 'array' }, { type: 'array', items: {} }],
  [
    { items: { type: 'null' }, minItems: 0 },
    { type: 'array', items: { type: 'null' }, minItems: 0 },
  ],
  [
    { type: 'array', maxItems: 2 ** 20 },
    { type: 'array', items: {}, maxItems: 2 ** 20 },
  ],
  [{ type: 'array', items: false, maxItems: 3 }, { enum: [[]] }],
  [
    { prefixItems: [true, { type: 'null' }], minItems: 2, maxItems: 2 },
    { type: 'array', prefixItems: [{}, { type: 'null' }], items: false },
  ],
  [{ anyOf: [{ type: 'null' }] }, { type: 'null' }],
  [{ oneOf: [{ type: 'null' }, {}] }, { anyOf: [{ type: 'null' }, {}] }],
  [
    { type: 'string', anyOf: [{ maxLength: 3 }, { type: ['string', 'null'] }] },
    { anyOf: [{ type: 'string', maxLength: 3 }, { type: 'string' }] },
  ],
  [
    { $ref: '#/$defs/a', minLength: 2, $defs: { a: { type: 'string' } } },
    { type: 'string', minLength: 2 },
  ],
  [
    { type: ['string', 'array', 'null'], maxLength: 3, minItems: 1 },
    { anyOf: [{ type: 'string', maxLength: 3 }, { type: 'array', items: {}, minItems: 1 }, { type: 'null' }] },
  ],
  [
    { $ref: '#/definitions/a', definitions: { a: { type: 'null' }, b: {} } },
    { $ref: '#/$defs/1', $defs: { 1: { type: 'null' } } },
  ],
])('%j is compiled as %j', (schema, converted) => {
  expect(supportedSchema(schema, 'schema').schema).toEqual(converted)
})

test.each([
  ['null', [null]],
  ['boolean', [true]],
  ['integer', [1]],
  ['number', [1, 1.5]],
  ['string', ['a']],
  ['array', [[1]]],
  ['object', [{ a: 1 }]],
  [
    ['null', 'array'],
    [null, [1]],
  ],
])('an enum contains only values of the type: %j', (type, values) => {
  const all = [null, true, 1, 1.5, 'a', [1], { a: 1 }]
  expect(supportedSchema({ type, enum: all }, 'schema')).toEqual(supportedSchema({ enum: values }, 'schema'))
})

test('a limit of lengths beside a pattern allows shorter texts', () => {
  for (const lengths of [{ maxLength: 1 }, { minLength: 0 }])
    expect(() => supportedSchema({ type: 'string', pattern: '^$', ...lengths }, 'schema')).not.toThrow()
})

test('characters of strings with length limits are added up, equal limits once, each up to 256', () => {
  const cost = (...of: object[]) =>
    supportedSchema({ anyOf: of.map(one => ({ type: 'string', ...one })) }, 'schema').characters
  expect(cost({})).toBe(0)
  expect(cost({ minLength: 3 })).toBe(3)
  expect(cost({ minLength: 3, maxLength: 10 })).toBe(10)
  expect(cost({ maxLength: 256 }, { maxLength: 1000 }, { maxLength: 10 }, { maxLength: 10 })).toBe(522)
})

test('the limits of a schema are exact', () => {
  const nulls = (count: number) => ({ anyOf: Array.from({ length: count }, () => ({ type: 'null' })) })
  const ofLength = (length: number) => ({ enum: ['x'.repeat(length - JSON.stringify({ enum: [''] }).length)] })
  for (const [most, over, message] of [
    [nulls(299), nulls(300), 'contains more than 300 schemas'],
    [nested(32), nested(33), 'nested deeper than 32 levels'],
    [ofLength(2 ** 16), ofLength(2 ** 16 + 1), 'longer than 65536'],
  ] as const) {
    expect(() => supportedSchema(most, 'schema')).not.toThrow()
    expect(() => supportedSchema(over, 'schema')).toThrow(message)
  }
})

test.each([
  ['pattern is not supported', { type: 'integer', pattern: '^a' }],
  ['format "iri" is not supported', { type: 'string', format: 'iri' }],
  ['not is not supported (at #/properties/a)', { type: 'object', properties: { a: { not: {} } } }],
  ['no value has both type string and type integer', { allOf: [{ type: 'string' }, { type: 'integer' }] }],
  [
    'several different values of prefixItems cannot be merged',
    { allOf: [{ prefixItems: [{}] }, { prefixItems: [true] }] },
  ],
  [
    'several different values of format cannot be merged',
    { allOf: [{ type: 'string', format: 'date' }, { format: 'time' }] },
  ],
  ['allOf is recursive', { $ref: '#/$defs/a', allOf: [{}], $defs: { a: { allOf: [{ $ref: '#/$defs/a' }] } } }],
  [
    'more than 300',
    {
      allOf: [{ $ref: '#/$defs/d0' }],
      $defs: Object.fromEntries(
        Array.from({ length: 12 }, (_, i) => [
          `d${i}`,
          { allOf: i < 11 ? [1, 2].map(() => ({ $ref: `#/$defs/d${i + 1}` })) : [] },
        ]),
      ),
    },
  ],
  ['required is not a list', { allOf: [{ required: 5 }, { required: ['a'] }] }],
  ['allOf is not a list of schemas', { allOf: 5 }],
  ['anyOf is not a list of schemas', { allOf: [{ anyOf: 5 }, {}] }],
  ['properties is not an object', { allOf: [{ properties: 5 }, { properties: {} }] }],
  ['enum is not a list', { enum: 5, allOf: [{ enum: [5] }] }],
  ['allOf contains more than 100 schemas', { allOf: Array.from({ length: 101 }, () => ({})) }],
  ['minLength is not supported here', { enum: ['a'], minLength: 3 }],
  ['enum is not supported here', { const: 'a', enum: ['b'] }],
  ['enum beside const is not supported', { allOf: [{ const: 'a', enum: ['b'] }] }],
  ['anyOf is not a non-empty list', { anyOf: [] }],
  ['unknown type "text"', { type: 'text' }],
  ['multipleOf is not supported', { type: 'integer', multipleOf: 3 }],
  ['no number is within the bounds', { type: 'integer', minimum: 1.2, maximum: 1.8 }],
  ['the minimum 4 is greater than the maximum 2', { type: 'string', minLength: 4, maxLength: 2 }],
  ['minLength is -1, expected an integer from 0 to 1048576', { type: 'string', minLength: -1 }],
  ['maxItems is 10000000000, expected an integer', { type: 'array', maxItems: 1e10 }],
  ['required contains "a"', { type: 'object', required: ['a'] }],
  ['contains quotes', { type: 'object', properties: { 'a"': {} } }],
  ['$ref is "#/$defs/b"', { $ref: '#/$defs/b', $defs: { a: {} } }],
  ['cannot end, since each requires another one', { $ref: '#' }],
  ['cannot end', { $ref: '#/$defs/a', $defs: { a: { $ref: '#/$defs/b' }, b: { anyOf: [{ $ref: '#/$defs/a' }] } } }],
  ['cannot end', { properties: { a: { $ref: '#' }, b: {} }, required: ['b', 'a'] }],
  ['cannot end', { items: { $ref: '#' }, minItems: 1 }],
  ['cannot end', { prefixItems: [{}, { $ref: '#' }] }],
  ['cannot end', { properties: { a: { allOf: [{ $ref: '#' }, { required: ['a'] }] } } }],
  [
    '(at #/$defs/a)',
    { properties: { b: { $ref: '#/$defs/a' } }, $defs: { a: { items: { $ref: '#/$defs/a' }, minItems: 2 } } },
  ],
  ['enum and type allow no value', { enum: [] }],
  ['enum and type allow no value', { type: 'string', enum: [1] }],
  ['minimum is "5", expected a number', { type: 'integer', minimum: '5' }],
  ['minLength is 0.5, expected an integer', { type: 'string', minLength: 0.5 }],
  ['must allow exactly as many items', { prefixItems: [{}, {}], minItems: 3 }],
  ['must allow exactly as many items', { prefixItems: [{}, {}], maxItems: 1 }],
  ['the minimum 2 is greater than the maximum 1', { type: 'array', minItems: 2, maxItems: 1 }],
  ['required is not a list', { properties: { a: {} }, required: 'a' }],
  ['prefixItems is not a list', { prefixItems: {} }],
  ['(at #/anyOf/1/items/additionalProperties)', { anyOf: [{}, { items: { additionalProperties: { not: {} } } }] }],
  ['uniqueItems is not supported', { items: {}, uniqueItems: true }],
  ['deeper than 32', nested(40)],
  ['more than 300', { anyOf: Array.from({ length: 400 }, () => ({})) }],
  ['longer than 65536', { enum: Array.from({ length: 5000 }, (_, i) => `a long text ${i}`) }],
  ['allows no value', false],
  ['expected an object', []],
  ['expected an object', 'text'],
])('unsupported schemas are rejected with a reason: %s', (message, schema) => {
  expect(() => supportedSchema(schema, 'schema')).toThrow(`schema: `)
  expect(() => supportedSchema(schema, 'schema')).toThrow(message)
})
