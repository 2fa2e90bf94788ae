import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { parseStrictJson } from './strict-json.ts'

const parse = (text: string) => parseStrictJson(new TextEncoder().encode(text), 64)

describe('parseStrictJson', () => {
  it('returns the same values as JSON.parse', () => {
    fc.assert(
      fc.property(fc.jsonValue({ maxDepth: 8 }), fc.constantFrom(undefined, 2), (value, indent) => {
        const text = JSON.stringify(value, null, indent)
        expect(parse(text)).toEqual(JSON.parse(text))
      }),
    )
  })

  it('accepts one key in sibling objects, and a key equal to a value', () => {
    expect(parse('[{"a":1},{"a":{"a":"a"}},"a"]')).toEqual([{ a: 1 }, { a: { a: 'a' } }, 'a'])
  })

  it.each([
    ['plain', '{"a":1,"b":2,"a":3}'],
    ['spelled with an escape', '{"a":1,"\\u0061":3}'],
    ['after a nested object', '{"a":{"x":[{}]},"a" \n:3}'],
    ['inside a nested object', '{"t":{"dtype":"F32","dtype":"U8"}}'],
    ['after a string with quotes and braces', '{"a":"\\"}{[","a":1}'],
    ['empty', '{"":1,"":2}'],
  ])('rejects a duplicate key: %s', (_, text) => {
    expect(() => parse(text)).toThrow(/duplicate key/)
  })

  it('rejects a duplicate key at any position', () => {
    fc.assert(
      fc.property(fc.uniqueArray(fc.string(), { minLength: 2 }), fc.nat(), fc.nat(), (keys, i, j) => {
        const twice = keys.toSpliced(i % (keys.length + 1), 0, keys[j % keys.length])
        const text = `{${twice.map(key => `${JSON.stringify(key)}:0`).join(',')}}`
        expect(() => parse(text)).toThrow(/duplicate key/)
      }),
    )
  })

  it('accepts the maximum depth', () => {
    const nested = (depth: number) => '['.repeat(depth) + ']'.repeat(depth)
    expect(JSON.stringify(parse(nested(64)))).toBe(nested(64))
    expect(() => parse(nested(65))).toThrow(/deeper than 64/)
  })

  it('rejects deep nesting before it exhausts the stack', () => {
    expect(() => parse('['.repeat(5_000_000))).toThrow(/deeper than 64/)
    expect(() => parse('{"a":'.repeat(1_000_000))).toThrow(/deeper than 64/)
  })

  it('rejects bytes that are not UTF-8, and text that is not JSON', () => {
    expect(() => parseStrictJson(new Uint8Array([0x22, 0xff, 0x22]), 4)).toThrow(/UTF-8/)
    for (const text of ['', '{', '{"a"', '"a', '{"a":1}}', "{'a':1}", '\ufeff{}', '"\\']) {
      expect(() => parse(text)).toThrow(SyntaxError)
    }
  })
})
