/** @file Weights of which the optimizer keeps a bf16 copy: products read the copy, and every write to the weight updates it. */
import { type OpAttrs, type OpName, Random, type Shape, type Value } from '@moe/core'
import { describe, expect, test } from 'vitest'
import type { CpuBackend } from './backend.ts'
import type { CpuBuffer } from './memory.ts'
import { highestIsa, testBackend } from './test-backend.ts'

const backend = await testBackend({ isa: await highestIsa() })
const random = new Random(5)
const adamw = { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, step: 1 }

function upload(data: Float32Array | Int32Array, shape: Shape): Value {
  const dtype = data instanceof Int32Array ? 'i32' : 'f32'
  return { handle: backend.upload(data, shape, dtype), shape, dtype }
}
const normal = (...shape: number[]) => upload(random.normal(shape.reduce((a, b) => a * b, 1)), shape)
const bufferOf = ({ handle }: Value) => handle as CpuBuffer
const free = (...values: Value[]) => {
  for (const { handle } of values) backend.free(handle)
}

function call<O extends OpName>(
  backend: CpuBackend,
  op: O,
  inputs: Value[],
  attrs: OpAttrs[O],
  shapes: Shape[],
): Value[] {
  const table = { ...backend.primitives, ...backend.fused } as Record<string, unknown>
  const kernel = table[op] as (inputs: Value[], attrs: unknown, outputs: unknown[]) => unknown[]
  const outputs = shapes.map(shape => ({ shape, dtype: 'f32' as const }))
  return kernel(inputs, attrs, outputs).map((handle, i) => ({ handle, ...outputs[i] }))
}

/** Updates `weight` in place with AdamW. */
function step(weight: Value, attrs = adamw): Value {
  const [grad, m, v, scale] = [
    ...[0, 1].map(() => normal(...weight.shape)),
    upload(new Float32Array(weight.shape.reduce((a, b) => a * b, 1)), weight.shape),
    upload(Float32Array.of(1), []),
  ]
  const [next, ...moments] = call(backend, 'adamwStep', [weight, grad, m, v, scale], attrs, Array(3).fill(weight.shape))
  free(weight, grad, m, v, scale, ...moments)
  return next
}

/** bf16 products whose second operand is a weight. */
const products: Record<string, { weight: Shape; run: (weight: Value) => Value[] }> = {}
for (const m of [1, 3, 4, 5, 14, 60, 300]) {
  for (const transposeB of [false, true]) {
    const [n, k] = [77, 203]
    const x = normal(m, k)
    const attrs = { transposeA: false, transposeB, precision: 'bf16' } as const
    products[`matmul of ${m} rows, ${transposeB ? 'transposed' : 'not transposed'}`] = {
      weight: transposeB ? [n, k] : [k, n],
      run: weight => call(backend, 'matmul', [x, weight], attrs, [[m, n]]),
    }
  }
}
{
  const x = normal(2, 20, 900)
  const attrs = { transposeA: false, transposeB: true, precision: 'bf16' } as const
  products['batched matmul of several passes'] = {
    weight: [2, 64, 900],
    run: weight => call(backend, 'matmul', [x, weight], attrs, [[2, 20, 64]]),
  }
}
for (const transposeW of [true, false]) {
  const ends = Int32Array.of(0, 2, 2, 33, 60, 200)
  const [offsets, x] = [upload(ends, [6]), normal(200, 64)]
  products[`groupedMatmul, ${transposeW ? 'transposed' : 'not transposed'}`] = {
    weight: transposeW ? [5, 96, 64] : [5, 64, 96],
    run: weight => call(backend, 'groupedMatmul', [x, weight, offsets], { transposeW, precision: 'bf16' }, [[200, 96]]),
  }
}
{
  const [rows, classes, dim] = [130, 1500, 96]
  const targets = upload(
    Int32Array.from({ length: rows }, (_, i) => (i % 7 === 0 ? -100 : (i * 11) % classes)),
    [rows],
  )
  const [x, dloss] = [normal(rows, dim), normal(rows)]
  const attrs = { ignoreIndex: -100, precision: 'bf16' } as const
  products['linearCrossEntropy and its gradient'] = {
    weight: [classes, dim],
    run(weight) {
      const [loss, lse] = call(backend, 'linearCrossEntropy', [x, weight, targets], attrs, [[rows], [rows]])
      const inputs = [x, weight, targets, lse, dloss]
      return [loss, lse, ...call(backend, 'linearCrossEntropyBackward', inputs, attrs, [x.shape, weight.shape])]
    },
  }
}

const bits = async (values: Value[]) => {
  const data = await Promise.all(values.map(value => backend.download(value)))
  free(...values)
  return data
}

/** Returns the result of `run` for the same values without a bf16 copy. */
async function withoutCopy(run: (weight: Value) => Value[], weight: Value) {
  const copy = upload((await backend.download(weight)) as Float32Array, weight.shape)
  const result = await bits(run(copy))
  free(copy)
  return result
}

describe.skipIf(!backend.bf16Matmul)('weights with a copy in bf16', () => {
  test.each(Object.keys(products))('%s reads the copy and gives the same bits as without it', async name => {
    const { weight: shape, run } = products[name]
    let weight = normal(...shape)
    expect(await bits(run(weight))).toEqual(await withoutCopy(run, weight))
    weight = step(weight)
    const { rounded } = bufferOf(weight)
    if (rounded === null) throw new Error('no copy')
    expect(await bits(run(weight))).toEqual(await withoutCopy(run, weight))
    // With another weight's copy in its place, the result differs.
    const other = step(step(weight, { ...adamw, lr: 0 }), { ...adamw, lr: 0.5 })
    const buffer = bufferOf(other)
    const kept = buffer.rounded
    const zeros = upload(new Float32Array(shape.reduce((a, b) => a * b, 1)), shape)
    buffer.rounded = bufferOf(zeros)
    const expected = await withoutCopy(run, zeros)
    const got = await bits(run(other))
    buffer.rounded = kept
    expect(got[0]).toEqual(expected[0])
    free(other, zeros)
    backend.checkGuards()
  })

  const shape = [48, 40]
  const run = (weight: Value) =>
    call(backend, 'matmul', [x48, weight], { transposeA: false, transposeB: true, precision: 'bf16' }, [[14, 48]])
  const x48 = normal(14, 40)
  const expectSame = async (weight: Value) => expect(await bits(run(weight))).toEqual(await withoutCopy(run, weight))
  /** Returns a weight that a product has read and AdamW has updated, so that it has a copy. */
  const trained = () => {
    const first = normal(...shape)
    free(...run(first))
    return step(first)
  }

  test('only weights read by bf16 products have a copy', () => {
    const before = backend.stats()
    const [read, unread] = [trained(), step(normal(...shape))]
    expect([read, unread].map(weight => bufferOf(weight).rounded !== null)).toEqual([true, false])
    const { handles, bytes } = backend.stats()
    expect([handles - before.handles, bytes - before.bytes]).toEqual([2, 2 * 48 * 40 * 4 + 48 * 40 * 2])
    free(read, unread)
    expect(backend.stats()).toMatchObject({ handles: before.handles, bytes: before.bytes })
  })

  test('write updates the copy', async () => {
    const weight = trained()
    backend.write(weight, random.normal(48 * 40))
    await expectSame(weight)
    free(weight)
  })

  test('write creates a copy of a weight that bf16 products have read', async () => {
    // As for a weight that another rank trains.
    const [read, unread] = [normal(48, 40), normal(48, 40)]
    free(...run(read))
    for (const weight of [read, unread]) backend.write(weight, random.normal(48 * 40))
    expect([read, unread].map(weight => bufferOf(weight).rounded !== null)).toEqual([true, false])
    await expectSame(read)
    free(read, unread)
  })

  test.each([true, false])('setRows updates the copy, donated %s', async donate => {
    const weight = trained()
    const before = await bits(run(weight))
    const [row, index] = [normal(1, 40), upload(Int32Array.of(3), [1])]
    const [next] = call(backend, 'setRows', [weight, index, row], { donate }, [shape])
    await expectSame(next)
    expect(await bits(run(weight))).toEqual(before)
    free(weight, next, row, index)
  })

  test('an AdamW step on a shared weight leaves the other owner unchanged', async () => {
    const weight = trained()
    const [alias] = call(backend, 'reshape', [weight], {}, [[1920]])
    const before = await bits(run(weight))
    const [grad, m, v, scale] = [normal(...shape), normal(...shape), trained(), upload(Float32Array.of(1), [])]
    const [next, ...moments] = call(backend, 'adamwStep', [weight, grad, m, v, scale], adamw, [shape, shape, shape])
    await expectSame(next)
    expect(await bits(run({ ...alias, shape }))).toEqual(before)
    free(weight, alias, grad, m, v, scale, next, ...moments)
  })

  test('an AdamW moment whose buffer has a copy updates it', async () => {
    const weights = [trained(), trained(), trained()]
    const [grad, scale] = [normal(...shape), upload(Float32Array.of(1), [])]
    const next = call(backend, 'adamwStep', [weights[0], grad, weights[1], weights[2], scale], adamw, [
      shape,
      shape,
      shape,
    ])
    for (const weight of next) await expectSame(weight)
    free(...weights, grad, scale, ...next)
  })

  // Ways in which a recorded step may update its weight in place.
  const updates: Record<string, (weight: Value, grad: Value) => Value> = {
    'an AdamW step': (weight, grad) => {
      const [m, v, scale] = [normal(...shape), normal(...shape), upload(Float32Array.of(1), [])]
      const [next, ...moments] = call(backend, 'adamwStep', [weight, grad, m, v, scale], adamw, [shape, shape, shape])
      free(m, v, scale, ...moments)
      return next
    },
    'an AdamW step on a shared weight': (weight, grad) => {
      const [alias] = call(backend, 'reshape', [weight], {}, [[1920]])
      const next = updates['an AdamW step'](weight, grad)
      free(alias)
      return next
    },
    'a subtraction': (weight, grad) => call(backend, 'binary', [weight, grad], { code: 'sub' }, [shape])[0],
    setRows: (weight, grad) => {
      const index = upload(
        Int32Array.from({ length: 48 }, (_, i) => 47 - i),
        [48],
      )
      const [next] = call(backend, 'setRows', [weight, index, grad], { donate: true }, [shape])
      free(index)
      return next
    },
  }
  test.each(Object.keys(updates))('%s in a captured graph keeps the copy up to date', async name => {
    const before = backend.stats().handles
    const [state, grad] = [{ ...trained() }, normal(...shape)]
    const pass = backend.capture(() => run(state))
    const update = backend.capture(
      () => {
        const next = updates[name](state, grad)
        backend.free(state.handle)
        state.handle = next.handle
      },
      { state: [state] },
    )
    for (let i = 0; i < 3; i++) {
      update.replay()
      backend.write(grad, random.normal(48 * 40))
      pass.replay()
      expect(await Promise.all(pass.result.map(value => backend.download(value)))).toEqual(
        await withoutCopy(run, state),
      )
      await expectSame(state)
    }
    free(...pass.result)
    pass.dispose()
    update.dispose()
    free(state, grad)
    expect(backend.stats().handles).toBe(before)
    backend.checkGuards()
  })

  test('an AdamW step captured before the weight has a copy creates none', async () => {
    const state = { ...normal(...shape) }
    free(...run(state))
    const grad = normal(...shape)
    const update = backend.capture(
      () => {
        const next = updates['an AdamW step'](state, grad)
        backend.free(state.handle)
        state.handle = next.handle
      },
      { state: [state] },
    )
    await expectSame(state)
    update.replay()
    await expectSame(state)
    update.dispose()
    free(state, grad)
  })

  test('the result of a graph gets no copy, because the next replay overwrites it', async () => {
    const [x, y] = [normal(...shape), normal(...shape)]
    const graph = backend.capture(() => call(backend, 'binary', [x, y], { code: 'sub' }, [shape])[0])
    graph.replay()
    free(...run(graph.result))
    const weight = step(graph.result)
    await expectSame(weight)
    graph.replay()
    await expectSame(weight)
    graph.dispose()
    free(x, y, weight)
  })
})
