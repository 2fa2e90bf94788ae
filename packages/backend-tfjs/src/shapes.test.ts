import { type Backend, concat, Random, scope, type Tensor, tensor, where } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import * as tf from '@tensorflow/tfjs-core'
import '@tensorflow/tfjs-backend-cpu'
import '@tensorflow/tfjs-backend-wasm'
import { describe, test } from 'vitest'
import { tfjsBackend } from './tfjs-backend.ts'

/** Returns a small size, sometimes 0. */
const size = (random: Random): number => (random.next() < 0.05 ? 0 : 1 + random.integer(5))

interface Draw {
  readonly random: Random
  readonly shape: number[]
  /** Creates random integers from -9 to 9 as f32, which are exact on every backend. */
  make(shape: readonly number[]): Tensor
}

/** Returns a shape that broadcasts to `shape`: some sizes are 1, and leading axes may be missing. */
function broadcastable({ random, shape }: Draw): number[] {
  return shape.slice(random.integer(shape.length + 1)).map(n => (random.next() < 0.4 ? 1 : n))
}

function shuffled({ random, shape }: Draw): number[] {
  const axes = shape.map((_, axis) => axis)
  for (let i = axes.length - 1; i > 0; i--) {
    const j = random.integer(i + 1)
    ;[axes[i], axes[j]] = [axes[j], axes[i]]
  }
  return axes
}

const ops: { readonly [name: string]: (draw: Draw) => Tensor } = {
  add: draw => draw.make(draw.shape).add(draw.make(broadcastable(draw))),
  maximum: draw => draw.make(broadcastable(draw)).maximum(draw.make(draw.shape)),
  lt: draw => draw.make(broadcastable(draw)).lt(draw.make(draw.shape)).cast('f32'),
  where: draw => {
    const condition = draw.make(broadcastable(draw)).lt(0)
    return where(condition, draw.make(draw.shape), draw.make(broadcastable(draw)))
  },
  permute: draw => draw.make(draw.shape).permute(shuffled(draw)),
  expand: draw => draw.make(broadcastable(draw)).expand(draw.shape),
  slice: draw => {
    const starts = draw.shape.map(n => draw.random.integer(n + 1))
    const sizes = draw.shape.map((n, axis) => draw.random.integer(n - starts[axis] + 1))
    return draw.make(draw.shape).slice(starts, sizes)
  },
  pad: draw => {
    const widths = () => draw.shape.map(() => draw.random.integer(3))
    return draw.make(draw.shape).pad(widths(), widths(), 2.5)
  },
  concat: draw => {
    if (draw.shape.length === 0) return draw.make([])
    const axis = draw.random.integer(draw.shape.length)
    const part = () => draw.make(draw.shape.map((n, at) => (at === axis ? size(draw.random) : n)))
    return concat([part(), part(), part()], axis)
  },
  sum: draw => {
    const axes = shuffled(draw).slice(0, draw.random.integer(draw.shape.length + 1))
    return draw.make(draw.shape).sum(axes)
  },
  max: draw => {
    const axes = shuffled(draw).slice(0, draw.random.integer(draw.shape.length + 1))
    return draw.make(draw.shape).max(axes, true)
  },
  cumsum: draw => draw.make([3, ...draw.shape]).cumsum(draw.random.integer(draw.shape.length + 1)),
  takeRows: draw => {
    const index = Int32Array.from({ length: 4 }, () => draw.random.integer(5) - 1)
    const x = draw.make([3, ...draw.shape])
    return x.takeRows(tensor(index, [2, 2], { backend: x.backend }))
  },
}

const backends: { readonly [name: string]: () => Backend } = {
  wasm: () => tfjsBackend(tf, { backend: 'wasm' }),
  'cpu, async reads': () => tfjsBackend(tf, { backend: 'cpu', reads: 'async' }),
}

for (const [name, open] of Object.entries(backends)) {
  describe(`${name} matches the reference`, () => {
    for (const [op, compute] of Object.entries(ops)) {
      test(`${op} of random shapes`, async () => {
        await tf.setBackend('wasm')
        await tf.setBackend('cpu')
        const backend = open()
        const handles = backend.stats().handles
        for (let seed = 0; seed < 60; seed++) {
          const [actual, expected] = [backend, referenceBackend()].map(target => {
            const random = new Random(seed).fork(op)
            const shape = Array.from({ length: random.integer(6) }, () => size(random))
            const make = (wanted: readonly number[]) => {
              const count = wanted.reduce((a, b) => a * b, 1)
              return tensor(
                Float32Array.from({ length: count }, () => random.integer(19) - 9),
                wanted,
                { backend: target },
              )
            }
            return scope(() => compute({ random, shape, make }))
          })
          assertClose(`seed ${seed}, ${expected.shape}`, await actual.values(), await expected.values())
          actual.dispose()
        }
        if (backend.stats().handles !== handles) throw new Error('handles leaked')
      })
    }
  })
}
