import { Random } from '@moe/core'
import { describe, expect, test } from 'vitest'
import { availableIsas, runOp, testBackend } from '../../test-backend.ts'
import { worstError } from '../worst-error.ts'

const shapes = [
  { P: 33, H: 8, N: 32, R: 16, V: 32 },
  { P: 5, H: 3, N: 7, R: 3, V: 21 },
  { P: 3, H: 1, N: 0, R: 2, V: 5 },
  { P: 4, H: 2, N: 6, R: 0, V: 0 },
  { P: 0, H: 2, N: 4, R: 4, V: 4 },
  { P: 2, H: 128, N: 128, R: 64, V: 128 },
]

describe.each(await availableIsas())(
  'mlaKeyValue on %s matches plain loops, with equal bits on 1 and 2 threads',
  isa => {
    test.each(shapes)('$P positions, $H heads of $N + $R and $V', async ({ P, H, N, R, V }) => {
      const random = new Random(1)
      const normal = (...shape: number[]) => ({ data: random.normal(shape.reduce((a, b) => a * b, 1)), shape })
      const [kv, ropeKey, dk, dv] = [
        normal(1, P, H, N + V),
        normal(1, P, 1, R),
        normal(1, P, H, N + R),
        normal(1, P, H, V),
      ]
      const k = new Float64Array(dk.data.length)
      const v = new Float64Array(dv.data.length)
      const dkv = new Float64Array(kv.data.length)
      const dropeKey = new Float64Array(ropeKey.data.length)
      for (let row = 0; row < P * H; row++) {
        const rope = Math.floor(row / H) * R
        for (let i = 0; i < N; i++) {
          k[row * (N + R) + i] = kv.data[row * (N + V) + i]
          dkv[row * (N + V) + i] = dk.data[row * (N + R) + i]
        }
        for (let i = 0; i < R; i++) {
          k[row * (N + R) + N + i] = ropeKey.data[rope + i]
          dropeKey[rope + i] += dk.data[row * (N + R) + N + i]
        }
        for (let i = 0; i < V; i++) {
          v[row * V + i] = kv.data[row * (N + V) + N + i]
          dkv[row * (N + V) + N + i] = dv.data[row * V + i]
        }
      }
      const spec = ({ shape }: { shape: number[] }) => ({ shape, dtype: 'f32' as const })
      const bits: unknown[] = []
      for (const threads of [1, 2]) {
        const backend = await testBackend({ isa, threads })
        const forward = await runOp(backend, 'mlaKeyValue', [kv, ropeKey], { nope: N }, [spec(dk), spec(dv)])
        const backward = await runOp(backend, 'mlaKeyValueBackward', [dk, dv], { nope: N }, [spec(kv), spec(ropeKey)])
        expect(forward.map(y => Array.from(y))).toEqual([k, v].map(y => Array.from(y)))
        expect(Array.from(backward[0])).toEqual(Array.from(dkv))
        expect(worstError(backward[1], dropeKey)).toBeLessThan(2e-6)
        bits.push(backward)
        backend.dispose()
      }
      expect(bits[1]).toEqual(bits[0])
    })
  },
)
