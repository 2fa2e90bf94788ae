import {
  backward,
  concat,
  Embedding,
  fromHost,
  gradients,
  Linear,
  Module,
  Random,
  RmsNorm,
  randn,
  setDefaultBackend,
  stateDict,
  type Tensor,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { expect, test } from 'vitest'
import { MtpModule, mtpLoss, shiftTokens } from './index.ts'

setDefaultBackend(referenceBackend())

class Identity extends Module {
  norm = new RmsNorm(4)
  forward(x: Tensor): Tensor {
    return this.norm.forward(x)
  }
}

function make(depth: number) {
  const random = new Random(1)
  const embedding = new Embedding(9, 4, { random: random.fork('e'), deviation: 0.5 })
  const head = new Linear(4, 9, { random: random.fork('h'), deviation: 0.5 })
  const modules = Array.from(
    { length: depth },
    (_, k) =>
      new MtpModule(
        { hidden_size: 4 },
        { embedding, head, random: random.fork(k), deviation: 0.5, makeBlock: () => new Identity() },
      ),
  )
  return { embedding, head, modules, random }
}

const rows = (tokens: number[], documents = tokens.map(() => 0)) => ({
  tokens: Int32Array.from(tokens),
  documents: Int32Array.from(documents),
  rows: 1,
  length: tokens.length,
})

test('targets: the last `shift` positions of every document carry no loss', () => {
  const batch = rows([1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 1, 1, 1])
  expect(shiftTokens(batch, 5, 1)).toEqual({
    ids: Int32Array.of(2, 3, 4, 5, 6),
    targets: Int32Array.of(2, 3, 4, -100, 6),
    count: 4,
  })
  expect(shiftTokens(batch, 5, 2)).toEqual({
    ids: Int32Array.of(3, 4, 5, 6, 7),
    targets: Int32Array.of(3, 4, -100, -100, 7),
    count: 3,
  })
  expect(shiftTokens(batch, 5, 1, { from: 2 }).count).toBe(2)
  expect(() => shiftTokens(batch, 6, 2)).toThrow(/cannot be shifted/)
})

test('keys are those of the released layer, without the shared parts', () => {
  const { modules } = make(1)
  expect(stateDict(modules[0]).map(({ name }) => name)).toEqual([
    'enorm.weight',
    'hnorm.weight',
    'eh_proj.weight',
    'shared_head.norm.weight',
    'norm.weight',
  ])
})

test('eh_proj takes the embedding first', async () => {
  const { modules, embedding, random } = make(1)
  const [module] = modules
  const hidden = randn([1, 1, 4], random)
  const id = shiftTokens(rows([3]), 1, 0).ids
  const ids = fromHost(id, [1, 1], 'i32')
  const both = concat([module.enorm.forward(embedding.forward(ids)), module.hnorm.forward(hidden)], 2)
  const expected = module.block.forward(module.eh_proj.forward(both), {})
  assertClose('hidden', await module.forward(hidden, ids, {}).values(), await expected.values(), tolerances.exact)
})

test('the causal chain: depth k at position i sees no token beyond i + k', async () => {
  const { modules, head, random } = make(2)
  const hidden = randn([1, 4, 4], random)
  const lossAt = (tokens: number[]) => mtpLoss(modules, hidden, rows(tokens), head.weight, {})
  // Token 6 is only a target of depth 2 at the last position; no input.
  const a = lossAt([1, 2, 3, 4, 5, 6, 7])
  const b = lossAt([1, 2, 3, 4, 5, 6, 8])
  expect(await a.perDepth[0].item()).toBe(await b.perDepth[0].item())
  expect(await a.perDepth[1].item()).not.toBe(await b.perDepth[1].item())
})

test('embedding and head gather gradients from every path', async () => {
  const { modules, head, embedding, random } = make(2)
  const hidden = randn([1, 4, 4], random)
  const { loss, perDepth } = mtpLoss(modules, hidden, rows([1, 2, 3, 4, 5, 6, 7]), head.weight, {})
  expect(await loss.detach().item()).toBeCloseTo(((await perDepth[0].item()) + (await perDepth[1].item())) / 2, 6)
  const [byHead, byEmbedding] = gradients(loss, [head.weight, embedding.weight], { retain: true })
  backward(loss)
  assertClose(
    'head',
    await (head.weight.grad as Tensor).values(),
    await (byHead as Tensor).values(),
    tolerances.elementwise,
  )
  // Depth 1 looks up tokens 1..4 places ahead (2, 3, 4, 5), depth 2 (3, 4, 5, 6).
  const rowsUsed = Array.from(await (byEmbedding as Tensor).abs().sum(1).values(), x => x > 0)
  expect(rowsUsed).toEqual([false, false, true, true, true, true, true, false, false])
})
