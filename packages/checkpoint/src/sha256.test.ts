import { createHash } from 'node:crypto'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { Sha256 } from './sha256.ts'

test('the digest of FIPS 180-4 for abc', () => {
  expect(new Sha256().update('abc').hex()).toBe('ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad')
})

test('digests are those of Node, in whatever pieces the bytes come', () => {
  const pieces = fc.array(fc.oneof(fc.uint8Array({ maxLength: 300 }), fc.string({ unit: 'binary' })), { maxLength: 6 })
  fc.assert(
    fc.property(pieces, parts => {
      const [own, node] = [new Sha256(), createHash('sha256')]
      for (const part of parts) {
        own.update(part)
        node.update(part)
      }
      expect(own.hex()).toBe(node.digest('hex'))
    }),
    { numRuns: 500 },
  )
})

test('of an array only what it shows counts, whatever its elements are', () => {
  const words = Int32Array.from({ length: 40 }, (_, i) => i * 7919).subarray(3, 33)
  expect(new Sha256().update(words).hex()).toBe(createHash('sha256').update(words).digest('hex'))
})

test('lengths around a block', () => {
  for (let length = 50; length < 70; length++) {
    const bytes = new Uint8Array(length).fill(length)
    expect(new Sha256().update(bytes).hex()).toBe(createHash('sha256').update(bytes).digest('hex'))
  }
})
