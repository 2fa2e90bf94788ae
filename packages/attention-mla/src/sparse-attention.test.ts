/** @file Sparse attention: the selection, caches, and the loss of the indexer. Numbers of transformers: mla.test.ts. */
import { readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { readSafetensors } from '@moe/checkpoint'
import {
  backward,
  checkpoint,
  fromHost,
  gradients,
  loadStateDict,
  namedParameters,
  QuantizedParameter,
  quantizeWeights,
  Random,
  randn,
  scope,
  setDefaultBackend,
  stateDict,
  type Tensor,
  zeros,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { afterEach, describe, expect, test } from 'vitest'
import {
  type CacheDType,
  LatentCache,
  type MlaConfig,
  type MlaForwardOptions,
  MultiHeadLatentAttention,
  PagedCache,
} from './index.ts'
import { limits } from './sparse-attention.ts'

setDefaultBackend(referenceBackend())

const whole = limits.scores
afterEach(() => {
  limits.scores = whole
})

const dense: MlaConfig = {
  hidden_size: 24,
  num_attention_heads: 3,
  q_lora_rank: 10,
  kv_lora_rank: 12,
  qk_nope_head_dim: 8,
  qk_rope_head_dim: 4,
  v_head_dim: 6,
}
const config: MlaConfig = { ...dense, index_topk: 4, index_n_heads: 5, index_head_dim: 6 }
const tolerance = { relative: 1e-5, absolute: 1e-6 }

const make = (own: MlaConfig = config, seed = 4) =>
  new MultiHeadLatentAttention(own, { random: new Random(seed), std: 0.3 })
const input = (batch: number, time: number, seed = 5) => randn([batch, time, 24], new Random(seed))

/** Rows `[time, features]` of a sequence. */
const rowsOf = async (x: Tensor, b: number) => x.narrow(0, b, b + 1).values()

test('the selection is that of transformers', async () => {
  for (const name of ['sparse', 'sparse-interleaved']) {
    const fixture = (ending: string) => fileURLToPath(new URL(`../fixtures/${name}.${ending}`, import.meta.url))
    const { config: own } = JSON.parse(readFileSync(fixture('json'), 'utf8'))
    await using file = await readSafetensors(fixture('safetensors'))
    const keys = file.keys().filter(key => key.startsWith('weight.'))
    const mla = make(own)
    await loadStateDict(mla, {
      keys: () => keys.map(key => key.slice(7)),
      info: key => file.info(`weight.${key}`) as never,
      read: async key => (await file.read(`weight.${key}`)).data as Float32Array,
    })
    const chosen = await file.read('topk')
    const [batch, time, count] = chosen.shape
    const positions = (await file.read('position_ids')).data as Int32Array
    const hidden = await file.read('hidden_states')
    const x = fromHost(hidden.data as Float32Array, hidden.shape, 'f32')
    const before = await mla.forward(x, { positions }).values()
    // Changing a token changes the output of exactly those that attend to it or have it in their input.
    for (let at = 0; at < time; at++) {
      const changed = (hidden.data as Float32Array).slice()
      const size = hidden.shape[2]
      for (let b = 0; b < batch; b++) {
        const from = (b * time + at) * size
        // Along its own direction, so that the norms hide little of the change: the latent is scaled, then normalized.
        for (let i = from; i < from + size; i++) changed[i] += i % 2 === 0 ? 1e-3 : -1e-3
      }
      const after = await mla.forward(fromHost(changed, hidden.shape, 'f32'), { positions }).values()
      for (let query = at + 1; query < time; query++) {
        for (let b = 0; b < batch; b++) {
          const row = (values: ArrayLike<number>) =>
            Array.from(values).slice((b * time + query) * size, (b * time + query + 1) * size)
          const difference = Math.max(...row(after).map((value, i) => Math.abs(value - row(before)[i])))
          const start = (b * time + query) * count
          const attends = (chosen.data as Int32Array).slice(start, start + count).includes(at)
          expect(difference > 1e-6, `${name}: token ${query} of row ${b} attends to ${at}`).toBe(attends)
        }
      }
    }
  }
})

test('with index_topk of at least the time, output and gradients are those of dense attention', async () => {
  const mla = make({ ...config, index_topk: 9 })
  const plain = make(dense)
  const x = input(2, 9)
  const run = async (layer: MultiHeadLatentAttention, options: MlaForwardOptions = {}) => {
    const output = layer.forward(x, options)
    const out = output.detach()
    backward(output.mul(output).sum())
    const named = namedParameters(layer).filter(({ name }) => !name.startsWith('indexer.'))
    return Promise.all([out, ...named.map(({ parameter }) => parameter.grad as Tensor)].map(each => each.values()))
  }
  const expected = await run(plain)
  // With a loss, the sparse form computes it; the loss itself is not part of what is differentiated here.
  for (const options of [{}, { onIndexerLoss: () => {} }]) {
    for (const { parameter } of namedParameters(mla)) parameter.zeroGrad()
    const found = await run(mla, options)
    expect(found.length).toBe(expected.length)
    // Sums of terms up to 100, so that each of the two has an error of 1e-5.
    for (const [i, values] of found.entries())
      assertClose(`${i}`, values, expected[i], i === 0 ? tolerance : tolerances.gradient)
  }
})

test('dense: true attends to all keys', async () => {
  const x = input(2, 9)
  const expected = await make(dense).forward(x).values()
  for (const options of [{}, { onIndexerLoss: () => {} }]) {
    assertClose(
      'out',
      await make()
        .forward(x, { dense: true, ...options })
        .values(),
      expected,
      tolerance,
    )
    const sparse = await make().forward(x, options).values()
    expect(Math.max(...sparse.map((value, i) => Math.abs(value - expected[i])))).toBeGreaterThan(1e-3)
  }
})

test.each([1, 40, 400])('chunks of %i scores compute the same', async scores => {
  const mla = make()
  const x = input(2, 11)
  const starts = fromHost(
    Int32Array.from({ length: 22 }, (_, i) => (i % 11 < 6 ? 0 : 6)),
    [2, 11],
    'i32',
  )
  const run = async () => {
    for (const { parameter } of namedParameters(mla)) parameter.zeroGrad()
    const losses: Tensor[] = []
    const output = mla.forward(x, { starts, onIndexerLoss: loss => void losses.push(loss) })
    const detached = [output.detach(), losses[0].detach()]
    backward(output.mul(output).sum().add(losses[0].sum()))
    const gradients = namedParameters(mla).map(({ parameter }) => parameter.grad as Tensor)
    const cache = new LatentCache(config, { layers: 1, batch: 2 })
    const cached = mla.forward(x, { cache, absorbUpTo: 0 })
    cache.dispose()
    return Promise.all([...detached, cached, ...gradients].map(each => each.values()))
  }
  const expected = await run()
  limits.scores = scores
  const found = await run()
  for (const [i, values] of found.entries()) {
    assertClose(`${i}`, values, expected[i], { relative: 1e-4, absolute: 1e-5 })
  }
})

test('texts that share a row compute the same as alone', async () => {
  const mla = make()
  const x = input(1, 13)
  const starts = fromHost(
    Int32Array.from({ length: 13 }, (_, i) => (i < 6 ? 0 : 6)),
    [1, 13],
    'i32',
  )
  const losses: Tensor[] = []
  const options = { onIndexerLoss: (loss: Tensor) => void losses.push(loss) }
  const together = await mla.forward(x, { starts, ...options }).values()
  const positions = Int32Array.from({ length: 7 }, (_, i) => i + 6)
  const alone = await mla.forward(x.narrow(1, 6, 13), { positions, ...options }).values()
  assertClose('out', together.subarray(6 * 24), alone, tolerance)
  assertClose('loss', (await losses[0].values()).subarray(6), await losses[1].values(), tolerance)
})

describe('over a cache', () => {
  for (const absorbUpTo of [0, 100]) {
    const form = absorbUpTo ? 'short passes' : 'long passes'
    test(`equals the full forward at every position, ${form}`, async () => {
      const mla = make()
      const x = input(2, 14)
      const expected = await mla.forward(x).values()
      // A small capacity, so that the cache has to grow: first all keys are selected, then four of them.
      const cache = new LatentCache(config, { layers: 1, batch: 2, capacity: 2 })
      const check = async (start: number, time: number) => {
        const out = mla.forward(x.narrow(1, start, start + time), { cache, absorbUpTo })
        for (let b = 0; b < 2; b++) {
          const rows = expected.subarray((b * 14 + start) * 24, (b * 14 + start + time) * 24)
          assertClose(`row ${b} from ${start}`, await rowsOf(out, b), rows, tolerance)
        }
      }
      let start = 0
      for (const time of [2, 1, 4, 1, 1, 5]) {
        await check(start, time)
        cache.advance(time)
        start += time
      }
      // Truncated tokens leave no trace.
      cache.truncate(6)
      await check(6, 3)
      cache.dispose()
    })

    test(`sequences in pages, of different lengths, compute the same as alone, ${form}`, async () => {
      const mla = make()
      const sizes = [13, 7, 3]
      const texts = sizes.map((time, i) => input(1, time, 20 + i))
      const expected = await Promise.all(texts.map(async x => (await mla.forward(x).values()).slice(-24)))
      const cache = new PagedCache(mla.cacheFeatures, { layers: 2, tokens: 60, pageSize: 4 })
      const sequences = texts.map(() => cache.start([]))
      for (const [i, x] of texts.entries()) {
        // In two parts and in turns with the others, so that pages are not in the order of the rows.
        cache.reserve(sequences[i], 2)
        mla.forward(x.narrow(1, 0, 2), { cache: cache.batch([sequences[i]]), absorbUpTo, layer: 1 })
        cache.batch([sequences[i]]).advance(2)
      }
      for (const [i, x] of texts.entries()) {
        const rest = x.shape[1] - 3
        cache.reserve(sequences[i], x.shape[1])
        if (rest === 0) continue
        mla.forward(x.narrow(1, 2, 2 + rest), { cache: cache.batch([sequences[i]]), absorbUpTo, layer: 1 })
        cache.batch([sequences[i]]).advance(rest)
      }
      const last = fromHost(
        Float32Array.from((await Promise.all(texts.map(x => x.values()))).flatMap(values => [...values.slice(-24)])),
        [3, 1, 24],
        'f32',
      )
      const out = mla.forward(last, { cache: cache.batch(sequences), absorbUpTo, layer: 1 })
      for (const b of sizes.keys()) assertClose(`sequence ${b}`, await rowsOf(out, b), expected[b], tolerance)
      cache.dispose()
    })
  }

  test.each([
    ['f32', 22 * 4],
    ['bf16', 22 * 2],
  ] as const)('stores latent, rope key and index key in %s', (dtype: CacheDType, bytes) => {
    const cache = new LatentCache(config, { layers: 3, batch: 2, capacity: 5, dtype })
    expect(cache.bytesPerToken).toBe(3 * bytes)
    expect(cache.bytes).toBe(3 * bytes * 10)
    expect(cache.rows(2, 'index').shape).toEqual([2, 5, 6])
    expect(cache.rows(2).shape).toEqual([2, 5, 16])
    cache.dispose()
    const without = new LatentCache(dense, { layers: 1 })
    expect(() => without.rows(0, 'index')).toThrow(/stores no keys of an indexer; create it with the cacheFeatures/)
    expect(() => make().forward(input(1, 3), { cache: without })).toThrow(/rows of shape \[1,3,6\] do not fit/)
    without.dispose()
  })
})

describe('a layer without an indexer', () => {
  /** A layer, and one with the same weights but without the indexer. */
  async function pair() {
    const full = make()
    const shared = new MultiHeadLatentAttention(config, { std: 0, indexer: false })
    const own = new Map(namedParameters(full).map(({ name, parameter }) => [name, parameter]))
    for (const { name, parameter } of namedParameters(shared)) parameter.assign((own.get(name) as Tensor).mul(1))
    return { full, shared }
  }

  test('has the output and gradients of the layer whose selection it uses', async () => {
    const { full, shared } = await pair()
    const starts = fromHost(
      Int32Array.from({ length: 26 }, (_, i) => (i % 13 < 7 ? 0 : 7)),
      [2, 13],
      'i32',
    )
    let selected: Tensor | undefined
    const onSelected = (keys: Tensor) => {
      selected = keys
    }
    const run = async (layer: MultiHeadLatentAttention, options: MlaForwardOptions) => {
      const x = input(2, 13)
      x.tracked = true
      const output = layer.forward(x, { starts, ...options })
      const found = output.detach()
      const [gradient] = gradients(output.mul(output).sum(), [x])
      return Promise.all([found.values(), gradient?.values()])
    }
    const expected = await run(full, { onSelected })
    expect(selected?.shape).toEqual([2, 13, 4])
    // One that wants no selection computes the same.
    for (const [layer, options] of [
      [full, {}],
      [shared, { selected }],
    ] as const) {
      const found = await run(layer, options)
      expect(found).toEqual(expected)
    }
  })

  test.each([0, 100])('over a cache, absorbing up to %i tokens', async absorbUpTo => {
    const { full, shared } = await pair()
    const x = input(1, 12)
    const cache = new PagedCache(full.cacheFeatures, { layers: 2, indexLayers: [0], tokens: 16, pageSize: 4 })
    const sequence = cache.start([])
    // Pages in another order than the tokens.
    const other = cache.start([])
    cache.reserve(other, 4)
    let from = 0
    for (const time of [3, 4, 5]) {
      cache.reserve(sequence, from + time)
      const batch = cache.batch([sequence])
      let selected: Tensor | undefined
      const onSelected = (keys: Tensor) => {
        selected = keys
      }
      const part = x.narrow(1, from, from + time)
      const own = full.forward(part, { cache: batch, layer: 0, absorbUpTo, onSelected })
      const found = shared.forward(part, { cache: batch, layer: 1, absorbUpTo, selected })
      expect(selected === undefined).toBe(from === 0)
      expect(await found.values()).toEqual(await own.values())
      batch.advance(time)
      from += time
    }
    cache.dispose()
  })

  test('needs a selection only if there are more keys than it selects', async () => {
    const { full, shared } = await pair()
    const missing = /the option selected is missing, and the layer has no indexer of its own; pass what onSelected/
    expect(() => shared.forward(input(1, 5))).toThrow(missing)
    expect(() => shared.forward(input(1, 5), { selected: zeros([1, 4, 4], { dtype: 'i32' }) })).toThrow(
      /shape \[1,4,4\], expected \[1, 5, 4\]/,
    )
    const cache = new LatentCache(config, { layers: 1, indexLayers: [] })
    expect(() => shared.forward(input(1, 5), { cache })).toThrow(missing)
    cache.dispose()
    for (const options of [{}, { dense: true }]) {
      const x = input(1, options.dense ? 9 : 4)
      const onSelected = () => expect.unreachable('all keys are selected')
      const [expected, found] = [full.forward(x, { ...options, onSelected }), shared.forward(x, options)]
      expect(await found.values()).toEqual(await expected.values())
    }
    expect(shared.cacheFeatures).toEqual({ attention: 16, index: 0 })
    expect(full.cacheFeatures).toEqual({ attention: 16, index: 6 })
  })
})

describe('the loss of the indexer', () => {
  /** For every token, KL(p || q) over the keys that it attends to, from the definition: eq. 3 and 4. */
  async function definition(mla: MultiHeadLatentAttention, x: Tensor, attendsToAll: boolean) {
    const { num_attention_heads: heads, qk_nope_head_dim: nope, qk_rope_head_dim: rotated, v_head_dim: value } = dense
    const weights = new Map<string, number[]>()
    for (const { name, data } of stateDict(mla)) weights.set(name, Array.from(await data()))
    const matrix = (name: string, columns: number) => {
      const flat = weights.get(name) as number[]
      return Array.from({ length: flat.length / columns }, (_, i) => flat.slice(i * columns, (i + 1) * columns))
    }
    const times = (rows: number[][], v: readonly number[]) => rows.map(row => dot(row, v))
    const dot = (a: readonly number[], b: readonly number[]) => a.reduce((sum, y, i) => sum + y * b[i], 0)
    const rms = (v: number[]) => v.map(y => y / Math.sqrt(dot(v, v) / v.length + 1e-6))
    const angles = (t: number) => Array.from({ length: rotated / 2 }, (_, i) => t * 10000 ** ((-2 * i) / rotated))
    const turn = (v: number[], t: number, pair: (i: number) => readonly [number, number]) => {
      const out = v.slice()
      angles(t).forEach((angle, i) => {
        const [a, b] = pair(i)
        out[a] = v[a] * Math.cos(angle) - v[b] * Math.sin(angle)
        out[b] = v[b] * Math.cos(angle) + v[a] * Math.sin(angle)
      })
      return out
    }
    const adjacent = (i: number) => [2 * i, 2 * i + 1] as const
    const halves = (i: number) => [i, i + rotated / 2] as const
    const split = (v: number[], size: number) =>
      Array.from({ length: v.length / size }, (_, i) => v.slice(i * size, (i + 1) * size))
    const values = Array.from(await x.values())
    const tokens = split(values, 24).map((h, t) => {
      const compressed = rms(times(matrix('q_a_proj.weight', 24), h))
      const both = times(matrix('kv_a_proj_with_mqa.weight', 24), h)
      const expanded = split(times(matrix('kv_b_proj.weight', 12), rms(both.slice(0, 12))), nope + value)
      const ropeKey = turn(both.slice(12), t, adjacent)
      const wk = times(matrix('indexer.wk.weight', 24), h)
      const mean = wk.reduce((sum, y) => sum + y, 0) / wk.length
      const centered = wk.map(y => y - mean)
      const deviation = Math.sqrt(dot(centered, centered) / wk.length + 1e-6)
      return {
        queries: split(times(matrix('q_b_proj.weight', 10), compressed), nope + rotated).map(q => [
          ...q.slice(0, nope),
          ...turn(q.slice(nope), t, adjacent),
        ]),
        keys: expanded.map(k => [...k.slice(0, nope), ...ropeKey]),
        indexQueries: split(times(matrix('indexer.wq_b.weight', 10), compressed), 6).map(q => turn(q, t, halves)),
        indexKey: turn(
          centered.map(y => y / deviation),
          t,
          halves,
        ),
        indexWeights: times(matrix('indexer.weights_proj.weight', 24), h).map(w => w / Math.sqrt(5 * 6)),
      }
    })
    const softmax = (v: number[]) => {
      const e = v.map(y => Math.exp(y - Math.max(...v)))
      return e.map(y => y / e.reduce((sum, z) => sum + z, 0))
    }
    return tokens.map((token, t) => {
      const seen = tokens.slice(0, t + 1)
      const scores = seen.map(({ indexKey }) =>
        dot(
          token.indexWeights,
          token.indexQueries.map(q => Math.max(0, dot(q, indexKey))),
        ),
      )
      const order = [...scores.keys()].sort((a, b) => scores[b] - scores[a] || a - b)
      const chosen = attendsToAll ? order : order.slice(0, 4)
      const perHead = Array.from({ length: heads }, (_, h) =>
        softmax(chosen.map(s => dot(token.queries[h], seen[s].keys[h]) / Math.sqrt(nope + rotated))),
      )
      const q = softmax(chosen.map(s => scores[s]))
      return chosen.reduce((sum, _, i) => {
        const p = perHead.reduce((total, one) => total + one[i], 0) / heads
        return sum + p * Math.log(p / q[i])
      }, 0)
    })
  }

  test.each([false, true])('is that of the definition; dense: %s', async attendsToAll => {
    const mla = make()
    const x = input(1, 9)
    const losses: Tensor[] = []
    mla.forward(x, { dense: attendsToAll, onIndexerLoss: loss => void losses.push(loss) })
    expect(losses[0].shape).toEqual([1, 9])
    const expected = await definition(mla, x, attendsToAll)
    expect(Math.max(...expected)).toBeGreaterThan(0.05)
    assertClose('loss', await losses[0].values(), expected, { relative: 1e-4, absolute: 1e-6 })
  })

  test.each([
    [false, false],
    [true, false],
    [false, true],
  ])('trains the indexer alone; dense: %s, recomputed: %s', async (attendsToAll, recompute) => {
    const mla = make()
    mla.recompute = recompute
    const x = input(2, 9)
    x.tracked = true
    const gradientsOf = async (of: 'loss' | 'out' | 'both') => {
      for (const { parameter } of namedParameters(mla)) parameter.zeroGrad()
      const result = scope(() => {
        const run = (given: Tensor) => {
          const losses: Tensor[] = []
          const out = mla.forward(given, { dense: attendsToAll, onIndexerLoss: loss => void losses.push(loss) })
          return [out, losses[0]]
        }
        const [out, each] = recompute ? checkpoint(run, x) : run(x)
        const loss = each.sum()
        const value = loss.detach()
        const squares = out.mul(out).sum()
        backward(of === 'loss' ? loss : of === 'out' ? squares : squares.add(loss))
        return value
      })
      const named = namedParameters(mla).map(async ({ name, parameter }) => {
        return [name, parameter.grad && (await parameter.grad.values())] as const
      })
      return { loss: await result.item(), of: new Map(await Promise.all(named)) }
    }
    const losses: Tensor[] = []
    mla.forward(x, { dense: attendsToAll, onIndexerLoss: loss => void losses.push(loss) })
    expect(gradients(losses[0].sum(), [x])).toEqual([null])
    const both = await gradientsOf('both')
    const alone = await gradientsOf('loss')
    const main = await gradientsOf('out')
    for (const [name, gradient] of both.of) {
      const isIndexer = name.startsWith('indexer.')
      expect(alone.of.get(name) !== null, name).toBe(isIndexer)
      const expected = (isIndexer ? alone : main).of.get(name) as Float32Array
      assertClose(name, gradient as Float32Array, expected, { relative: 1e-4, absolute: 1e-6 })
      expect(Math.max(...expected.map(Math.abs)), name).toBeGreaterThan(1e-5)
    }
    // Down along the gradient, the loss falls as the gradient says. The selection does not change on the way.
    const { of, loss } = alone
    const rate = 1e-4
    let predicted = 0
    for (const { name, parameter } of namedParameters(mla)) {
      const gradient = of.get(name) as Float32Array | null
      if (!gradient) continue
      predicted += rate * gradient.reduce((sum, g) => sum + g * g, 0)
      parameter.assign(parameter.detach().sub(fromHost(gradient, parameter.shape, 'f32').mul(rate)))
    }
    const after = await gradientsOf('loss')
    expect((loss - after.loss) / predicted).toBeCloseTo(1, 1)
  })
})

test('quantization leaves the weights of the heads as they are', async () => {
  const later = make()
  await quantizeWeights(later, 'int8')
  const sooner = new MultiHeadLatentAttention(config, { random: new Random(4), weights: 'int8' })
  for (const { indexer } of [later, sooner]) {
    const weights = [indexer?.wq_b.weight, indexer?.wk.weight, indexer?.weights_proj.weight]
    expect(weights.map(weight => weight instanceof QuantizedParameter)).toEqual([true, true, false])
  }
})

test('invalid settings of the indexer are reported together', () => {
  expect(() =>
    make({ ...config, index_topk: 0, index_n_heads: undefined, index_head_dim: 2, q_lora_rank: null }),
  ).toThrow(
    /index_topk = 0.*index_n_heads = undefined.*index_head_dim = 2 is less than qk_rope_head_dim = 4.*requires q_lora_rank/,
  )
})
