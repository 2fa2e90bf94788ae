import { createHash } from 'node:crypto'
import { expect, test } from 'vitest'
import { createHash as browserCreateHash } from '../../../scripts/browser-crypto.ts'

test("createHash of the browser build computes the same digests as Node's", () => {
  const words = Int32Array.from({ length: 1000 }, (_, i) => i * 2_654_435_761)
  const digests = [createHash, browserCreateHash].map(create => {
    const hash = create('sha256').update('naïve 🜁\n')
    for (const end of [0, 13, 64, 1000]) hash.update(words.subarray(3, end))
    return hash.update(new Uint8Array(words.buffer, 1, 55)).digest('hex')
  })
  expect(digests[1]).toBe(digests[0])
})
