import { crossEntropy } from '@moe/core'
import { runOp } from '@moe/core/testing'
import { describe, expect, test } from 'vitest'
import { testBackend, unavailable } from '../../test-backend.ts'
import { compareWithReference, normal } from '../../test-compare-with-reference.ts'

const ignoreIndex = -100
const spec = (...shape: number[]) => ({ shape, dtype: 'f32' as const })

describe.skipIf(unavailable)('crossEntropy', () => {
  test.each([
    [1, 1],
    [9, 5000],
    [5, 9001],
    [2, 20_000],
    [0, 7],
  ])('%i rows of %i classes', async (rows, classes) => {
    const ignored = [ignoreIndex, -1, classes, 2 ** 30]
    const data = Array.from({ length: rows }, (_, i) =>
      i % 5 === 4 ? ignored[((i / 5) | 0) % 4] : (i * 4999) % classes,
    )
    const targets = { data, shape: [rows], dtype: 'i32' as const }
    await compareWithReference([normal([rows, classes], 5), targets], (x, t) => [crossEntropy(x, t, { ignoreIndex })])
  })

  test('a logit of -Infinity has probability 0, and NaN affects only its row', async () => {
    const low = Number.NEGATIVE_INFINITY
    const logits = new Float32Array(4 * 40).fill(low)
    logits[3] = 5
    logits.fill(0.5, 80)
    logits[90] = Number.NaN
    const backend = await testBackend()
    const inputs = [
      { data: logits, shape: [4, 40] },
      { data: [3, ignoreIndex, 1, 2], shape: [4], dtype: 'i32' as const },
    ]
    const [loss, lse] = await runOp(backend, 'crossEntropy', inputs, { ignoreIndex }, [spec(4), spec(4)])
    backend.dispose()
    expect([...loss.subarray(0, 3)]).toEqual([0, 0, Number.NaN])
    expect(loss[3]).toBeCloseTo(Math.log(40), 5)
    expect([...lse.subarray(0, 2)]).toEqual([5, low])
  })
})
