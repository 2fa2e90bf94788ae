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
  SwigluMlp,
  setDefaultBackend,
  softmax,
  stateDict,
  type Tensor,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { expect, test } from 'vitest'
import {
  depthTargets,
  idsAhead,
  MtpModule,
  mtpAcceptance,
  mtpDepthLoss,
  mtpLoss,
  shiftTokens,
  uploadTargets,
} from './index.ts'

setDefaultBackend(referenceBackend())

class Identity extends Module {
  norm = new RmsNorm(4)
  forward(x: Tensor): Tensor {
    return this.norm.forward(x)
  }
}

function make(depth: number, separate = false) {
  const random = new Random(1)
  const embedding = new Embedding(9, 4, { random: random.fork('e'), std: 0.5 })
  const head = new Linear(4, 9, { random: random.fork('h'), std: 0.5 })
  const modules = Array.from(
    { length: depth },
    (_, k) =>
      new MtpModule(
        { hidden_size: 4 },
        { embedding, head, random: random.fork(k), std: 0.5, separate, makeBlock: () => new Identity() },
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

test('the last `shift` positions of every document have no loss', () => {
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

test('padding has no loss, whether its negative document numbers repeat or not', () => {
  for (const padding of [
    [-1, -1, -1],
    [-1, -2, -3],
  ]) {
    const { targets, count } = shiftTokens(rows([1, 2, 3, 4, 5, 6], [0, 0, 0, ...padding]), 5, 1)
    expect([...targets]).toEqual([2, 3, -100, -100, -100])
    expect(count).toBe(2)
  }
})

test('rows with arrays of the wrong length or invalid sizes, flat inputs and empty lists of modules are rejected', () => {
  const batch = { ...rows([1, 2, 3, 4]), rows: 2 }
  expect(() => shiftTokens(batch, 3, 1)).toThrow(expect.objectContaining({ code: 'E_SHAPE' }))
  expect(() => shiftTokens(rows([1, 2, 3, 4], [0, 0, 0]), 3, 1)).toThrow(/4 tokens and 3 documents/)
  const { head, modules } = make(1)
  const flat = randn([3, 4], new Random(1))
  expect(() => modules[0].forward(flat, flat, {})).toThrow(/has shape \[3,4\], expected \[batch, time, hidden\]/)
  expect(() => mtpLoss([], randn([1, 3, 4], new Random(1)), rows([1, 2, 3, 4]), head.weight, {})).toThrow(
    /the list of modules is empty/,
  )
  expect(() => mtpLoss(modules, null as never, rows([1, 2, 3, 4]), head.weight, {})).toThrow(/the input is null/)
  for (const [wrong, problem] of [
    [{ tokens: undefined }, 'the rows have no tokens'],
    [{ documents: null }, 'the rows have no documents'],
    [{ rows: -1 }, 'rows = -1 is invalid'],
    [{ length: Number.NaN }, 'length = NaN is invalid'],
  ] as const) {
    const changed = { ...rows([1, 2, 3, 4, 5, 6]), ...wrong } as ReturnType<typeof rows>
    expect(() => mtpLoss(modules, randn([1, 3, 4], new Random(1)), changed, head.weight, {})).toThrow(problem)
  }
  expect(() => shiftTokens(rows([1, 2, 3]), 1.5, 1)).toThrow('time = 1.5')
  expect(() => shiftTokens(rows([1, 2, 3]), 1, -1)).toThrow('shift = -1')
})

test('a module without embedding, head or block, or with an invalid epsilon, is rejected', () => {
  const { embedding, head } = make(1)
  const all = { embedding, head, makeBlock: () => new SwigluMlp(4, 8) }
  for (const name of ['embedding', 'head', 'makeBlock'] as const) {
    expect(() => new MtpModule({ hidden_size: 4 }, { ...all, [name]: undefined })).toThrow(
      `the option ${name} is missing`,
    )
  }
  expect(() => new MtpModule({ hidden_size: 4, rms_norm_eps: -1 }, all)).toThrow(
    /eps is -1, expected a number of at least 0/,
  )
})

test('the state dict has the keys of the released layer, without the shared parts', () => {
  const { modules } = make(1)
  expect(stateDict(modules[0]).map(({ name }) => name)).toEqual([
    'enorm.weight',
    'hnorm.weight',
    'eh_proj.weight',
    'shared_head.norm.weight',
    'norm.weight',
  ])
})

test('the input of eh_proj is the embedding, then the hidden state', async () => {
  const { modules, embedding, random } = make(1)
  const [module] = modules
  const hidden = randn([1, 1, 4], random)
  const id = shiftTokens(rows([3]), 1, 0).ids
  const ids = fromHost(id, [1, 1], 'i32')
  const combined = concat([module.enorm.forward(embedding.forward(ids)), module.hnorm.forward(hidden)], 2)
  const expected = module.block.forward(module.eh_proj.forward(combined), {})
  assertClose('hidden', await module.forward(hidden, ids, {}).values(), await expected.values(), tolerances.exact)
})

test('the prediction of depth k at position i depends on no token beyond i + k', async () => {
  const { modules, head, random } = make(2)
  const hidden = randn([1, 4, 4], random)
  const lossAt = (tokens: number[]) => mtpLoss(modules, hidden, rows(tokens), head.weight, {})
  // Token 6 is only a target of depth 2 at the last position, never an input.
  const a = lossAt([1, 2, 3, 4, 5, 6, 7])
  const b = lossAt([1, 2, 3, 4, 5, 6, 8])
  expect(await a.perDepth[0].item()).toBe(await b.perDepth[0].item())
  expect(await a.perDepth[1].item()).not.toBe(await b.perDepth[1].item())
})

test.each([false, true])(
  'the loss of a depth is the mean cross-entropy of its logits, separate %s; 0 without targets',
  async separate => {
    const { modules, head, random } = make(3, separate)
    const hidden = randn([1, 4, 4], random)
    // Depth 1 has two positions with a loss, depth 2 has one, depth 3 none.
    const tokens = rows([1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 1, 2, 3, 4])
    const { loss, perDepth } = mtpLoss(modules, hidden, tokens, head.weight, {})
    let state = hidden
    const expected = []
    for (const [k, module] of modules.entries()) {
      const { ids } = shiftTokens(tokens, 4, k + 1)
      state = module.forward(state, fromHost(ids, [1, 4], 'i32'), {})
      const probs = await softmax(module.logits(state)).values()
      state = module.normalize(state)
      const { targets, count } = shiftTokens(tokens, 4, k + 2)
      const losses = [...targets].map((target, i) => (target < 0 ? 0 : -Math.log(probs[i * 9 + target])))
      expect(count).toBe(2 - k)
      expected.push(losses.reduce((sum, loss) => sum + loss, 0) / Math.max(1, count))
    }
    for (const [k, one] of perDepth.entries()) expect(await one.item()).toBeCloseTo(expected[k], 6)
    expect(await loss.detach().item()).toBeCloseTo(expected.reduce((sum, one) => sum + one, 0) / 3, 6)
  },
)

test('embedding and head accumulate the gradients of all uses', async () => {
  const { modules, head, embedding, random } = make(2)
  const hidden = randn([1, 4, 4], random)
  const { loss, perDepth } = mtpLoss(modules, hidden, rows([1, 2, 3, 4, 5, 6, 7]), head.weight, {})
  expect(await loss.detach().item()).toBeCloseTo(((await perDepth[0].item()) + (await perDepth[1].item())) / 2, 6)
  const [headGradient, embeddingGradient] = gradients(loss, [head.weight, embedding.weight], { retainGraph: true })
  backward(loss)
  assertClose(
    'head',
    await (head.weight.grad as Tensor).values(),
    await (headGradient as Tensor).values(),
    tolerances.elementwise,
  )
  // Depth 1 embeds the tokens 2 to 5, depth 2 the tokens 3 to 6.
  const rowsUsed = Array.from(await (embeddingGradient as Tensor).abs().sum(1).values(), x => x > 0)
  expect(rowsUsed).toEqual([false, false, true, true, true, true, true, false, false])
})

test('with detached: true, only the modules get gradients', async () => {
  const { modules, head, embedding, random } = make(2)
  const hidden = randn([1, 4, 4], random)
  hidden.tracked = true
  const tokens = rows([1, 2, 3, 4, 5, 6, 7])
  const joint = mtpLoss(modules, hidden, tokens, head.weight, {})
  const detached = mtpLoss(modules, hidden, tokens, head.weight, {}, { detached: true })
  expect(await detached.loss.detach().item()).toBe(await joint.loss.detach().item())
  const all = gradients(joint.loss, [hidden, head.weight, embedding.weight, modules[0].eh_proj.weight])
  expect(all.map(gradient => gradient !== null)).toEqual([true, true, true, true])
  const own = gradients(detached.loss, [hidden, head.weight, embedding.weight, modules[0].eh_proj.weight])
  expect(own.map(gradient => gradient !== null)).toEqual([false, false, false, true])
})

test('unknown options are rejected', () => {
  const { modules, head, random } = make(1)
  const [module] = modules
  const hidden = randn([1, 2, 4], random)
  const ids = fromHost(Int32Array.of(1, 2), [1, 2], 'i32')
  const typo = { detach: true } as object
  const rows = { tokens: Int32Array.of(1, 2, 3, 4), documents: new Int32Array(4), rows: 1, length: 4 }
  const uploaded = uploadTargets(depthTargets(rows, 2, 1), 1, hidden.backend)
  for (const call of [
    () => module.forward(hidden, ids, {}, typo),
    () => module.combine(hidden, ids, typo),
    () => mtpDepthLoss(module, 1, hidden, uploaded, head.weight, typo),
    () => mtpLoss(modules, hidden, rows, head.weight, {}, typo),
  ])
    expect(call).toThrow('unknown option detach; did you mean detached?')
})

test.each([false, true])(
  'mtpDepthLoss for each depth gives the losses and gradients of mtpLoss, detached %s',
  async detached => {
    const { modules, head, embedding, random } = make(2)
    const hidden = randn([2, 4, 4], random)
    hidden.tracked = true
    const tokens = Int32Array.from({ length: 14 }, (_, i) => (i * 5) % 9)
    const host = depthTargets({ tokens, documents: new Int32Array(14), rows: 2, length: 7 }, 4, 2)
    const rows = uploadTargets(host, 2, hidden.backend)
    const all = mtpLoss(modules, hidden, rows, head.weight, {}, { detached })
    let state = detached ? hidden.detach() : hidden
    const [first, second] = modules.map((module, k) => {
      const combined = module.combine(state, idsAhead(rows, 4, k + 1), { detached })
      state = module.normalize(module.block.forward(combined, {}))
      return mtpDepthLoss(module, k + 1, state, rows, head.weight, { detached })
    })
    for (const [k, loss] of [first, second].entries())
      expect(await loss.detach().item()).toBe(await all.perDepth[k].item())
    const of = [hidden, head.weight, embedding.weight, ...modules.map(({ eh_proj }) => eh_proj.weight)]
    const values = (gradients: ReadonlyArray<Tensor | null>) =>
      Promise.all(gradients.map(gradient => gradient?.values()))
    const separate = await values(gradients(first.add(second).mul(0.5), of))
    expect(separate).toEqual(await values(gradients(all.loss, of)))
    expect(separate.map(gradient => gradient !== undefined)).toEqual([!detached, !detached, !detached, true, true])
  },
)

test('a separate embedding and head have the released keys, and those of the main model get no gradient', async () => {
  const { modules, head, embedding, random } = make(1, true)
  expect(stateDict(modules[0]).map(({ name }) => name)).toEqual([
    'enorm.weight',
    'hnorm.weight',
    'eh_proj.weight',
    'shared_head.norm.weight',
    'shared_head.head.weight',
    'norm.weight',
    'embed_tokens.weight',
  ])
  const { loss } = mtpLoss(modules, randn([1, 4, 4], random), rows([1, 2, 3, 4, 5, 6]), head.weight, {})
  const own = [modules[0].ownHead as Tensor, (modules[0].embed_tokens as Embedding).weight]
  const found = gradients(loss, [head.weight, embedding.weight, ...own])
  expect(found.map(gradient => gradient !== null)).toEqual([false, false, true, true])
})

test('mtpAcceptance compares the draft of depth k at position i with the main model at position i + k', async () => {
  const { modules, head, random } = make(2)
  const hidden = randn([2, 6, 4], random)
  const [length, time] = [9, 6]
  // Token 0 is a target, too.
  const tokens = Int32Array.from({ length: 2 * length }, (_, i) => (i * 5 + 7) % 9)
  // Row 1 changes document after its fourth token.
  const documents = Int32Array.from({ length: 2 * length }, (_, i) => (i >= length + 4 ? 1 : 0))
  const batch = { tokens, documents, rows: 2, length }
  const best = async (logits: Tensor) => Array.from(await logits.topk(1).indices.values())
  const main = await best(head.forward(hidden))
  const drafts: number[][] = []
  let state = hidden
  for (const [k, module] of modules.entries()) {
    state = module.normalize(module.forward(state, fromHost(shiftTokens(batch, time, k + 1).ids, [2, time], 'i32'), {}))
    drafts.push(await best(module.score(state)))
  }
  const expected = [1, 2].map(depth => {
    let [positions, individual, cumulative] = [0, 0, 0]
    for (let row = 0; row < 2; row++) {
      for (let i = 0; i + depth < time; i++) {
        if (documents[row * length + i] !== documents[row * length + i + depth + 1]) continue
        const agrees = (d: number) => i + d < time && drafts[d - 1][row * time + i] === main[row * time + i + d]
        positions++
        if (agrees(depth)) individual++
        if (Array.from({ length: depth }, (_, d) => agrees(d + 1)).every(Boolean)) cumulative++
      }
    }
    return { individual: individual / positions, cumulative: cumulative / positions }
  })
  const found = mtpAcceptance(modules, hidden, batch, head.weight, {})
  for (const [k, { individual, cumulative }] of expected.entries()) {
    expect(await found.individual[k].item()).toBeCloseTo(individual, 6)
    expect(await found.cumulative[k].item()).toBeCloseTo(cumulative, 6)
  }
  expect(expected[0].individual).toBeGreaterThan(0)
})

test('drafts of a module that repeats the main model are always accepted', async () => {
  const { modules, head } = make(1)
  // A head of zeros: every argmax is token 0.
  head.weight.assign(randn([9, 4], new Random(0), { std: 0 }))
  const { individual } = mtpAcceptance(
    modules,
    randn([1, 4, 4], new Random(1)),
    rows([1, 2, 3, 4, 5, 6]),
    head.weight,
    {},
  )
  expect(await individual[0].item()).toBe(1)
})

test('mtpAcceptance does not keep the logits of all positions in memory at once', async () => {
  const { modules, random } = make(1)
  const [vocabulary, time] = [300, 1024]
  const weight = randn([vocabulary, 4], random)
  const hidden = randn([1, time, 4], random)
  const tokens = rows(Array.from({ length: time + 2 }, (_, i) => i % 9))
  const { individual } = mtpAcceptance(modules, hidden, tokens, weight, {})
  expect(Number.isFinite(await individual[0].item())).toBe(true)
  expect(weight.backend.stats().peakBytes).toBeLessThan(time * vocabulary * 8)
})
