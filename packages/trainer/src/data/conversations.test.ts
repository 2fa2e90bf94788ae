import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { backward, namedParameters, noGrad, softmax, tensor, zeroGrad } from '@moe/core'
import { readF64, referenceBackend } from '@moe/core/reference'
import { DeepSeek, presets } from '@moe/deepseek'
import fc from 'fast-check'
import { afterEach, describe, expect, test } from 'vitest'
import { modelFolder } from '../checkpoints/model-folder.ts'
import { evaluate } from '../evaluate.ts'
import type { TrainEvent } from '../events.ts'
import type { TextTokenizer, TokenBatch } from '../model.ts'
import {
  BigramModel,
  letterData,
  nextTokens,
  removeTemporaryFolders,
  roundingBackend,
  temporaryFolder,
} from '../test-model.ts'
import { train } from '../train.ts'
import { type Conversation, conversationFiles, conversations, tokenizeConversations } from './conversations.ts'
import { evaluationWindows } from './evaluation-windows.ts'
import { longestExample, truncatedTokens } from './examples.ts'
import { TokenDataset } from './token-dataset.ts'
import { TrainingOrder } from './training-order.ts'

afterEach(removeTemporaryFolders)

const ask = (content: string) => ({ role: 'user', content })
const answer = (content: string) => ({ role: 'assistant', content })

/** `u…` for a question, `a…z` for an answer; a prompt ends with `a`. */
const template = {
  render: (messages: Conversation, { addGenerationPrompt }: { addGenerationPrompt: boolean }) =>
    messages.map(({ role, content }) => (role === 'assistant' ? `a${content}z` : `u${content}`)).join('') +
    (addGenerationPrompt ? 'a' : ''),
}

/** A tokenizer with one token per character. Unless told otherwise, it adds a begin token, as many tokenizers do. */
const characters: TextTokenizer = {
  vocabSize: 256,
  encode: (text, { addSpecialTokens = true } = {}) =>
    Uint8Array.from(`${addSpecialTokens ? '<' : ''}${text}`, character => character.charCodeAt(0)),
}

/** The examples of a data set as text, with learned tokens in upper case. */
function shown(data: TokenDataset): string[] {
  const starts = new Set(data.starts)
  const text = Array.from(data.tokens, (id, i) => {
    const character = String.fromCharCode(id)
    return starts.has(i) ? character : character.toUpperCase()
  }).join('')
  const examples = [...(data.examples ?? [])]
  return examples.map((start, i) => text.slice(start, examples[i + 1]))
}

/** For each position of the rows with a loss, the tokens that it attends to and the next one, as text. */
function predictions({ tokens, documents, starts, rows, length }: TokenBatch, positions: number): string[] {
  return Array.from({ length: rows }, (_, row) =>
    Array.from({ length: positions }, (_, t) => {
      const at = row * length + t
      const text = String.fromCharCode(...tokens.subarray(row * length + (starts?.[at] ?? 0), at + 2))
      return documents[at] >= 0 && documents[at] === documents[at + 1] ? [text] : []
    }).flat(),
  ).flat()
}

describe('tokenizeConversations', () => {
  const learned = (...all: Conversation[]) => shown(tokenizeConversations(all, characters, template))

  test('learns answers, including their end tokens, and nothing else', () => {
    expect(learned([ask('hi'), answer('yo')])).toEqual(['uhiaYOZ'])
    expect(learned([ask('b'), answer('c'), ask('d'), answer('e')], [answer('f')])).toEqual(['ubaCZudaEZ', 'aFZ'])
    expect(learned([{ role: 'system', content: 's' }, ask('b'), answer('')])).toEqual(['usubaZ'])
  })

  test('uses answers of weight 0 as context only, and leaves out messages after the last learned one', () => {
    expect(learned([ask('b'), { ...answer('c'), weight: 0 }, ask('d'), answer('e'), ask('f')])).toEqual(['ubaczudaEZ'])
    expect(learned([ask('b'), answer('c'), ask('d'), { ...answer('e'), weight: 0 }])).toEqual(['ubaCZ'])
  })

  test('splits a conversation if the template drops parts of earlier answers, so that each answer follows its context', () => {
    const forgets = {
      render: (messages: Conversation, options: { addGenerationPrompt: boolean }) =>
        template.render(
          messages.map((message, i) =>
            i < messages.length - 1 ? { ...message, content: message.content.replace(/.*\|/, '') } : message,
          ),
          options,
        ),
    }
    const data = tokenizeConversations([[ask('b'), answer('t|c'), ask('d'), answer('e')]], characters, forgets)
    expect(shown(data)).toEqual(['ubaT|CZ', 'ubaczudaEZ'])
  })

  test('counts the bytes of the learned text', () => {
    const data = tokenizeConversations(
      [[ask('bcd'), answer('é'), ask('f'), { ...answer('g'), weight: 0 }]],
      characters,
      template,
    )
    expect(data.textBytes).toBe(2)
    expect([data.documents, data.predictable, data.unpredictable, longestExample(data)]).toEqual([1, 2, 0, 6])
  })

  test('rejects a template that does not render answers after its generation prompt', () => {
    const other = {
      render: (_: Conversation, { addGenerationPrompt }: { addGenerationPrompt: boolean }) =>
        addGenerationPrompt ? 'x' : 'y',
    }
    expect(() => tokenizeConversations([[ask('b'), answer('c')]], characters, other)).toThrow(
      expect.objectContaining({
        code: 'E_DATA',
        message: expect.stringMatching(/message 1 of conversation 0 .*messages end with "y", the prompt with "x"/),
      }),
    )
  })
})

describe('examples', () => {
  /** Examples of lower-case letters, each with whether it is learned. */
  const exampleLists = fc.array(
    fc.array(fc.tuple(fc.integer({ min: 97, max: 122 }), fc.boolean()), { minLength: 1, maxLength: 12 }),
    { minLength: 1, maxLength: 8 },
  )
  const lengths = fc.record({
    sequenceLength: fc.integer({ min: 1, max: 30 }),
    lookahead: fc.integer({ min: 1, max: 3 }),
    isolate: fc.boolean(),
  })
  const datasetOf = (examples: [number, boolean][][]) =>
    TokenDataset.fromExamples(
      examples.map(example => ({ tokens: example.map(([id]) => id), lossMask: example.map(([, is]) => is) })),
    )
  const expectedPredictions = (examples: [number, boolean][][], sequenceLength: number) =>
    examples.flatMap(example =>
      example.flatMap(([, is], i) =>
        i > 0 && is && i <= sequenceLength ? [String.fromCharCode(...example.slice(0, i + 1).map(([id]) => id))] : [],
      ),
    )

  test('predict every learned token once per epoch, from the tokens before it in its example', () => {
    fc.assert(
      fc.property(exampleLists, lengths, (examples, sizes) => {
        const expected = expectedPredictions(examples, sizes.sequenceLength).sort()
        fc.pre(expected.length > 0)
        const data = datasetOf(examples)
        const order = new TrainingOrder(data, { ...sizes, batchSize: 1 })
        const rows = Array.from({ length: order.windows }, (_, i) =>
          predictions(order.step(i)[0], sizes.sequenceLength),
        )
        expect(rows.flat().sort()).toEqual(expected)
        expect(rows.filter(row => row.length === 0)).toEqual([])
        expect(data.predictable - truncatedTokens(data, sizes.sequenceLength)).toBe(expected.length)
        const evaluated = [...evaluationWindows(data, { ...sizes, batchSize: 3 })]
        expect(evaluated.flatMap(({ batch }) => predictions(batch, sizes.sequenceLength)).sort()).toEqual(expected)
        expect(evaluated.every(({ from }) => from === 0)).toBe(true)
      }),
    )
  })

  test('are packed into rows with isolate, and each token attends only to its own example', () => {
    fc.assert(
      fc.property(exampleLists, lengths, (examples, { sequenceLength, lookahead }) => {
        fc.pre(expectedPredictions(examples, sequenceLength).length > 0)
        const data = datasetOf(examples)
        const sizes = { sequenceLength, lookahead, batchSize: 1 }
        const order = new TrainingOrder(data, { ...sizes, isolate: true })
        const room = sequenceLength + 1
        const free: number[] = []
        for (let i = 0; i < order.windows; i++) {
          const [{ documents, starts = new Int32Array(), length }] = order.step(i)
          const padding = documents.findIndex(document => document < 0)
          const filled = padding < 0 ? length : padding
          for (let at = 0; at < length; at++) {
            expect(starts[at]).toBe(at >= filled ? at : at > 0 && starts[at] < at ? starts[at - 1] : at)
          }
          free.push(room - filled)
        }
        // The two emptiest rows do not fit into one.
        const [largest, next] = free.sort((a, b) => b - a)
        if (next !== undefined) expect(largest).toBeLessThan(room - next)
      }),
    )
  })

  test('documents in the same window do not attend to each other with isolate', () => {
    const data = TokenDataset.fromTokens([
      [1, 2, 3],
      [4, 5, 6, 7],
    ])
    const order = new TrainingOrder(data, { sequenceLength: 4, lookahead: 1, batchSize: 2, isolate: true })
    const [{ tokens, starts }] = order.step(0)
    const rows = [0, 1].map(row => [
      ...tokens.slice(row * 5, row * 5 + 5),
      ...(starts?.slice(row * 5, row * 5 + 5) ?? []),
    ])
    expect(rows.sort((a, b) => a[0] - b[0])).toEqual([
      [1, 2, 3, 4, 5, 0, 0, 0, 3, 3],
      [5, 6, 7, 1, 1, 0, 0, 0, 3, 4],
    ])
  })

  test('are selected evenly by an evaluation limit', () => {
    const data = datasetOf(
      Array.from({ length: 26 }, (_, i) => [
        [97, true],
        [97 + i, true],
        [97, true],
        [97, true],
      ]),
    )
    const batches = [...evaluationWindows(data, { sequenceLength: 8, lookahead: 1, batchSize: 4, limit: 40 })]
    const letters = batches.flatMap(({ batch }) =>
      Array.from({ length: batch.rows }, (_, row) => batch.tokens[row * batch.length + 1]),
    )
    expect(letters).toEqual([97, 99, 102, 104, 107, 110, 112, 115, 117, 120])
  })

  test('are rejected if they are inconsistent or have nothing to learn', () => {
    const expectError = (make: () => unknown, message: RegExp) =>
      expect(make).toThrow(expect.objectContaining({ code: 'E_DATA', message: expect.stringMatching(message) }))
    expectError(
      () => TokenDataset.fromExamples([{ tokens: [1, 2], lossMask: [1] }]),
      /example 0 has 2 tokens, but 1 entries/,
    )
    expectError(
      () => TokenDataset.fromExamples([{ tokens: [1, 2], lossMask: [1, 0] }]),
      /none of the 2 tokens is learned/,
    )
    expectError(() => TokenDataset.fromExamples([]), /0 tokens/)
    const misspelled = { tokens: [1, 2], loss_mask: [0, 1] }
    expect(() => TokenDataset.fromExamples([misspelled])).toThrow(
      expect.objectContaining({ code: 'E_CONFIG', message: expect.stringMatching(/loss_mask.*lossMask/) }),
    )
    const late = TokenDataset.fromExamples([{ tokens: [1, 2, 3, 4], lossMask: [0, 0, 0, 1] }])
    expectError(
      () => new TrainingOrder(late, { sequenceLength: 2, lookahead: 1, batchSize: 1 }),
      /none of 1 examples .* first 2 positions; .* longest example has 3/,
    )
  })

  test('know the token that ends all of them', () => {
    expect(TokenDataset.fromExamples([{ tokens: [1, 2, 9] }, { tokens: [3, 9] }]).end).toBe(9)
    expect(TokenDataset.fromExamples([{ tokens: [1, 2, 9] }, { tokens: [3, 8] }]).end).toBe(undefined)
  })

  test('have another digest than documents with the same tokens', () => {
    const tokens = [
      [1, 2],
      [3, 4],
    ]
    expect(TokenDataset.fromExamples(tokens.map(ids => ({ tokens: ids }))).digest).not.toBe(
      TokenDataset.fromTokens(tokens).digest,
    )
  })
})

describe('with DeepSeek', () => {
  const config = {
    ...presets.tiny,
    vocab_size: 256,
    hidden_size: 32,
    intermediate_size: 32,
    moe_intermediate_size: 16,
    num_hidden_layers: 2,
    max_position_embeddings: 64,
  }
  const all = [
    [ask('how'), answer('so')],
    [ask('b'), answer('cde'), ask('f'), answer('g')],
  ]
  const data = tokenizeConversations(all, characters, template)

  test.each([false, true])(
    'the loss is that of the answers, each given its own conversation; isolate: %j',
    async isolate => {
      const backend = referenceBackend()
      const model = new DeepSeek(config, { backend })
      const sizes = { sequenceLength: 24, lookahead: model.lookahead, batchSize: isolate ? 1 : 2, isolate }
      const order = new TrainingOrder(data, sizes)
      expect(order.windows).toBe(sizes.batchSize)
      const [batch] = order.step(0)
      const { nll, count } = noGrad(() => model.loss(batch, { training: false }))
      let expected = 0
      for (const text of ['uhowasoz', 'ubacdezufagz']) {
        const ids = characters.encode(text, { addSpecialTokens: false })
        const logits = noGrad(() => model.forward(tensor(Int32Array.from(ids), [1, ids.length], { backend })))
        const probabilities = readF64(noGrad(() => softmax(logits)))
        const at = text === 'uhowasoz' ? [5, 6, 7] : [3, 4, 5, 6, 10, 11]
        for (const i of at) expected -= Math.log(probabilities[(i - 1) * 256 + ids[i]])
      }
      expect(count).toBe(9)
      expect(readF64(nll)[0]).toBeCloseTo(expected, 6)
      const evaluated = await evaluate(model, data, { sequenceLength: 24, batchSize: 2, isolate })
      expect(evaluated.tokens).toBe(9)
      expect(evaluated.bitsPerByte).toBeCloseTo(expected / Math.LN2 / 6, 5)
    },
  )

  test('train packs conversations, and resumes only with the same setting', async () => {
    const out = await temporaryFolder()
    const backend = roundingBackend()
    const chats = Array.from({ length: 12 }, (_, i) => [ask('b'), answer('c'.repeat(1 + (i % 4)))])
    const events: TrainEvent[] = []
    const options = {
      data: conversations(chats, { template, validation: 0.2 }),
      tokenizer: characters,
      batchSize: 1,
      sequenceLength: 24,
      out,
      progress: false,
    }
    const onEvent = (event: TrainEvent) => events.push(event)
    const run = await train(new DeepSeek(config, { backend }), { ...options, steps: 2, onEvent })
    expect(events[0]).toMatchObject({ type: 'start', settings: { isolate: true } })
    // Ten conversations of 5 to 8 tokens, three or four in a row of 25.
    expect(events[0]).toMatchObject({ epochs: 2 / 3 })
    const heldOut = options.data.validation.map(([, { content }]) => content.length + 1)
    expect(run.validation.tokens).toBe(heldOut.reduce((sum, count) => sum + count, 0))
    const resumed = { ...options, steps: 2, resume: true }
    await expect(train(new DeepSeek(config, { backend }), { ...resumed, isolate: false })).rejects.toThrow(/isolate/)
    await train(new DeepSeek(config, { backend }), resumed)
    const bigram = new BigramModel({ backend })
    await expect(train(bigram, { ...options, data: letterData(), steps: 1, isolate: true })).rejects.toThrow(
      expect.objectContaining({
        code: 'E_CONFIG',
        message: expect.stringMatching(/isolates documents that share a row/),
      }),
    )
  })

  test('gradients with packed conversations equal those with one row each, including MTP', () => {
    const backend = referenceBackend()
    const model = new DeepSeek(config, { backend, objective: { balanceWeight: 0 } })
    const gradients = [false, true].map(isolate => {
      const sizes = { sequenceLength: 24, lookahead: model.lookahead, batchSize: isolate ? 1 : 2, isolate }
      zeroGrad(model)
      backward(model.loss(new TrainingOrder(data, sizes).step(0)[0]).loss)
      return namedParameters(model).flatMap(({ name, parameter }) =>
        parameter.grad === null ? [] : [{ name, grad: [...readF64(parameter.grad)] }],
      )
    })
    expect(gradients[1].map(({ name }) => name)).toEqual(gradients[0].map(({ name }) => name))
    for (const [i, { name, grad }] of gradients[0].entries()) {
      const scale = Math.max(...grad.map(Math.abs), 1e-6)
      const apart = Math.max(...grad.map((x, j) => Math.abs(x - gradients[1][i].grad[j])))
      // Rotation angles are rounded to f32, and depend on the position of the conversation in its row.
      expect(apart / scale, name).toBeLessThan(1e-6)
    }
  })
})

describe('conversationFiles', () => {
  test('reads a conversation per line, as an object with messages or a list', async () => {
    const cwd = await temporaryFolder()
    const first = [ask('é\u2028'), answer('b')]
    const second = [ask('c'), { ...answer('d'), tool_calls: [{ id: 1 }] }]
    await writeFile(
      join(cwd, 'a.jsonl'),
      `\uFEFF${JSON.stringify({ messages: first, id: 7 })}\r\n\n${JSON.stringify(second)}\n`,
    )
    await writeFile(join(cwd, 'b.jsonl'), JSON.stringify(first))
    expect(conversationFiles('*.jsonl', { template, cwd })).toEqual({
      training: [first, second, first],
      validation: [],
      template,
    })
    const split = conversationFiles('*.jsonl', { template, cwd, validation: { files: 'b.jsonl' } })
    expect(split).toEqual({ training: [first, second], validation: [first], template })
    const drawn = conversationFiles('*.jsonl', { template, cwd, validation: 0.3 })
    expect([drawn.training.length, drawn.validation.length]).toEqual([2, 1])
  })

  test.each([
    ['cut JSON', '[{"role": "user"', /a\.jsonl:2 is not JSON/],
    ['a list over several lines', '[', /a\.jsonl:2 is not JSON.*over several lines/],
    ['another form', '{"prompt": "b", "completion": "c"}', /a\.jsonl:2 is not a list of messages/],
    ['null', 'null', /a\.jsonl:2 is not a list/],
    [
      'tools',
      '{"messages": [{"role": "assistant", "content": "b"}], "tools": [{"type": "function"}]}',
      /a\.jsonl:2 has tools, which are not passed to the template; describe them in a system message/,
    ],
    ['a message that is null', '[null]', /role of message 0 of .*a\.jsonl:2 is not a string/],
    [
      'a message without text',
      '[{"role": "assistant", "content": null}]',
      /content of message 0 of .*:2 is not a string/,
    ],
    ['an invalid weight', '[{"role": "assistant", "content": "b", "weight": 0.5}]', /has weight 0\.5; pass 0 or 1/],
    ['no answer', '[{"role": "user", "content": "b"}]', /a\.jsonl:2 has no answer to learn/],
    ['no answer that is learned', '[{"role": "assistant", "content": "b", "weight": 0}]', /has no answer to learn/],
  ])('rejects %s by file and line', async (_, line, message) => {
    const cwd = await temporaryFolder()
    await writeFile(join(cwd, 'a.jsonl'), `${JSON.stringify([ask('b'), answer('c')])}\n${line}\n`)
    expect(() => conversationFiles('a.jsonl', { template, cwd })).toThrow(
      expect.objectContaining({ code: 'E_DATA', message: expect.stringMatching(message) }),
    )
  })

  test('rejects a missing or pending template, and held-out data from too few conversations', () => {
    expect(() => conversationFiles('a.jsonl', { template: Promise.resolve() as never })).toThrow(
      /template is a promise.*await ChatTemplate/,
    )
    expect(() => conversations([], { template: undefined as never })).toThrow(
      expect.objectContaining({ code: 'E_CONFIG' }),
    )
    expect(() => conversations([[ask('b'), answer('c')]], { template, validation: 0.5 })).toThrow(
      /none can be held out/,
    )
  })
})

test('train learns answers, warns about truncation, and saves the template with the model', async () => {
  const out = await temporaryFolder()
  const random = (i: number) => String.fromCharCode(98 + ((i * 7) % 9))
  // The answer is the letter after that of the question.
  const all = Array.from({ length: 60 }, (_, i) => [
    ask(random(i)),
    answer(String.fromCharCode(random(i).charCodeAt(0) + 1).repeat(i === 5 ? 40 : 1)),
  ])
  const small: TextTokenizer = {
    vocabSize: 12,
    encode: text => Uint8Array.from(text, c => ('uaz'.includes(c) ? 9 + 'uaz'.indexOf(c) : c.charCodeAt(0) - 98) % 12),
  }
  const kept = { ...template, toJSON: () => ({ chat_template: 'x' }) }
  const notices: string[] = []
  const run = await train(new BigramModel({ backend: roundingBackend() }), {
    data: conversations(all, { template: kept, validation: 0.1 }),
    tokenizer: small,
    steps: 40,
    lr: 0.05,
    batchSize: 8,
    sequenceLength: 8,
    out,
    progress: false,
    onEvent: event => {
      if (event.type === 'notice') notices.push(event.message)
    },
  })
  expect(run.validation.tokens).toBe(12)
  // A bigram sees only `a` before the answer, so that it guesses one of nine letters, but it learns that `z` ends an answer.
  expect(run.validation.loss).toBeGreaterThan(Math.log(9) / 2 - 0.4)
  expect(run.validation.loss).toBeLessThan(Math.log(9) / 2 + 0.4)
  expect(notices).toEqual([
    expect.stringMatching(
      /^23\.\d % of the tokens to learn are truncated: .* first 8 positions .* needs a sequenceLength of 43/,
    ),
  ])
  expect(JSON.parse(await readFile(join(modelFolder(out), 'tokenizer_config.json'), 'utf8'))).toEqual({
    chat_template: 'x',
  })
  await expect(
    train(new BigramModel({ backend: roundingBackend() }), { data: conversations(all, { template }), steps: 1 }),
  ).rejects.toThrow(/conversations, but no tokenizer is given/)
  await expect(
    train(new BigramModel({ backend: roundingBackend() }), {
      data: conversations(all, { template }),
      tokenizer: small,
      eos: 3,
      steps: 1,
    }),
  ).rejects.toThrow(/whose template writes these tokens/)
})

test('the loss mask of examples selects the targets of a bigram', () => {
  const data = TokenDataset.fromExamples([{ tokens: [1, 2, 3, 4], lossMask: [0, 0, 1, 1] }])
  const [batch] = new TrainingOrder(data, { sequenceLength: 5, lookahead: 1, batchSize: 1 }).step(0)
  expect([...nextTokens(batch, 0).targets]).toEqual([-100, 3, 4, -100, -100])
})
