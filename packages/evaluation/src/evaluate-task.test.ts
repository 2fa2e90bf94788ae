import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { fromHost, setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { DeepSeek, presets } from '@moe/deepseek'
import { trainBpe } from '@moe/tokenizer-bpe'
import { afterAll, beforeAll, describe, expect, onTestFinished, test } from 'vitest'
import {
  type ChoiceTask,
  type EvaluateTaskOptions,
  evaluateTask,
  type ItemResult,
  readTask,
  type Task,
  tasks,
} from './index.ts'
import { characters, knownModel } from './test-model.ts'

const options: EvaluateTaskOptions = { tokenizer: characters, bos: null, prefix: 94 }

/** A model in which the probability of a character depends only on the character. */
const byCharacter = (nats: Readonly<Record<string, number>>) =>
  knownModel({ logProb: (_, next) => -(nats[next] ?? 10) })

describe('metrics', () => {
  const choice: ChoiceTask = { name: 'custom', kind: 'choice', context: 'q', choices: 'c', answer: 'a' }
  const { model } = byCharacter({ ' ': 0, a: 1, b: 1.5, é: 0.75 })

  test('of choices use sums of log-probabilities, per character, and per byte', async () => {
    const items: ItemResult[] = []
    const lines = [
      // The sums -4 and -1.5 choose the second. Per character, -1 and -1.5 choose the first.
      { q: 'x', c: ['aaaa', 'b'], a: 0 },
      // The sums -1.5 and -1 choose the second. -0.75 and -1 per character, and -0.375 and -1 per byte, choose the first.
      { q: 'x', c: ['éé', 'a'], a: 1 },
      { q: 'x', c: ['b', 'a', 'a'], a: 2 },
      { q: 'x', c: ['a', 'b'], a: 'a' },
    ]
    const result = await evaluateTask(model, choice, lines, { ...options, onItem: item => items.push(item) })
    expect(items.map(({ metrics }) => metrics)).toEqual([
      { acc: 0, acc_norm: 1, acc_bytes: 1 },
      { acc: 1, acc_norm: 0, acc_bytes: 0 },
      { acc: 0, acc_norm: 0, acc_bytes: 0 },
      { acc: 1, acc_norm: 1, acc_bytes: 1 },
    ])
    expect(items[0]).toMatchObject({
      item: 0,
      location: 'item 0',
      prompt: 'x',
      logProbs: [-4, -1.5],
      chosen: 1,
      answer: 0,
    })
    const half = { value: 0.5, stderr: Math.sqrt(1 / 3) / 2 }
    expect(result).toMatchObject({
      task: 'custom',
      items: 4,
      shots: 0,
      truncated: 0,
      metrics: { acc: half, acc_norm: half },
    })
    for (const name of ['draw', 'seed']) expect(result).not.toHaveProperty(name)
  })

  test('are NaN if log-probabilities are', async () => {
    const broken = knownModel({ logProb: () => Number.NaN })
    const { metrics } = await evaluateTask(broken.model, choice, [{ q: 'x', c: ['a', 'b'], a: 0 }], options)
    expect(metrics.acc).toEqual({ value: Number.NaN, stderr: null })
  })

  test('of the last word are accuracy and perplexity', async () => {
    const last = knownModel({
      logProb: (_, next) => (next === ' ' ? 0 : -0.5),
      likeliest: before => 'and so on'[before.length] ?? 'x',
    })
    const lines = [{ text: 'and so' }, { text: 'and as' }]
    const { metrics } = await evaluateTask(last.model, tasks.lambada, lines, options)
    expect(metrics.acc.value).toBe(0.5)
    expect(metrics.perplexity).toEqual({ value: Math.exp(1), stderr: 0 })
  })

  test('of text are perplexities and bits per byte, for a text file as one text', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'moe-evaluation-'))
    onTestFinished(() => rm(folder, { recursive: true }))
    await writeFile(join(folder, 'a.txt'), 'aé b')
    const { metrics } = await evaluateTask(model, tasks.text, join(folder, 'a.txt'), options)
    // 1 + 0.75 + 0 + 1.5 nats, 5 bytes, 2 words.
    expect(metrics.bits_per_byte.value).toBeCloseTo(3.25 / 5 / Math.LN2, 12)
    expect(metrics.word_perplexity.value).toBeCloseTo(Math.exp(3.25 / 2), 12)
    expect(metrics.byte_perplexity.value).toBeCloseTo(Math.exp(3.25 / 5), 12)
  })

  test('of generated texts are matches with answers, up to a stop text', async () => {
    const generator = knownModel({
      likeliest: before => (before.includes('?') ? ' 42\nmore'[before.split('?')[1].length] : ''),
      logProb: () => 0,
    })
    const task: Task = {
      name: 'custom',
      kind: 'generation',
      context: '{{q}}?',
      answer: 'a',
      stop: ['\n'],
      maxTokens: 20,
    }
    const items: ItemResult[] = []
    const lines = [
      { q: 'six times seven', a: '42' },
      { q: 'and', a: ['43', '42'] },
      { q: 'or', a: 7 },
    ]
    const { metrics } = await evaluateTask(generator.model, task, lines, {
      ...options,
      onItem: item => items.push(item),
    })
    expect(items.map(({ text, metrics }) => [text, metrics.exact_match])).toEqual([
      [' 42', 1],
      [' 42', 1],
      [' 42', 0],
    ])
    expect(metrics.exact_match.value).toBeCloseTo(2 / 3, 12)
    expect(items.map(({ answer }) => answer)).toEqual(['42', ['43', '42'], '7'])
    const custom: Task = { ...task, matches: { even: (text, { q }) => Number(text) % 2 === 0 && q !== 'or' } }
    expect((await evaluateTask(generator.model, custom, lines, options)).metrics.even.value).toBeCloseTo(2 / 3, 12)
  })

  test('of generated texts have defaults: up to an empty line, 256 tokens, the whole text', async () => {
    const ask = async (written: string) => {
      const { model } = knownModel({
        likeliest: before => written[before.length - 'x'.length] ?? 'z',
        logProb: () => 0,
      })
      const items: ItemResult[] = []
      const task: Task = { name: 'custom', kind: 'generation', context: 'q', answer: 'a' }
      await evaluateTask(model, task, [{ q: 'x', a: 'A b' }], { ...options, onItem: item => items.push(item) })
      return items[0]
    }
    expect(await ask(' A b\n\nmore')).toMatchObject({ text: ' A b', metrics: { exact_match: 1 } })
    expect(await ask('A b.\n\n')).toMatchObject({ text: 'A b.', metrics: { exact_match: 0 } })
    expect((await ask('')).text).toBe('z'.repeat(256))
  })

  test('come with the prompt, or those of all choices if they have their own', async () => {
    const items: ItemResult[] = []
    const more = { ...options, onItem: (item: ItemResult) => items.push(item) }
    const line = { sentence: 'the _ of it', option1: 'a', option2: 'b', answer: '2' }
    await evaluateTask(model, tasks.winogrande, [line, { ...line, option1: 'b' }], more)
    expect(items.map(({ prompt }) => prompt)).toEqual([['the a', 'the b'], 'the b'])
  })

  test('are also returned by group, and for a limited number of items', async () => {
    const lines = ['x', 'y', 'x', 'y', 'x'].map((g, i) => ({ q: 'q', c: ['b', 'a'], a: i < 3 ? 1 : 0, g }))
    const result = await evaluateTask(model, { ...choice, group: 'g' }, lines, options)
    expect(result.groups).toMatchObject({
      x: { items: 3, metrics: { acc: { value: 2 / 3 } } },
      y: { items: 2, metrics: { acc: { value: 0.5, stderr: 0.5 } } },
    })
    const some = await evaluateTask(model, { ...choice, group: 'g' }, lines, { ...options, limit: 1 })
    expect(some).toMatchObject({ items: 1, groups: { x: { items: 1, metrics: { acc: { value: 1, stderr: null } } } } })
    expect(some.groups).not.toHaveProperty('y')
  })
})

describe('examples', () => {
  const lines = Array.from({ length: 6 }, (_, i) => ({ q: `q${i}`, c: ['a', 'b'], a: i % 2 }))
  const choice: ChoiceTask = { name: 'custom', kind: 'choice', context: '{{q}}:', choices: 'c', answer: 'a' }

  test('are between the description and the item, with their answers', async () => {
    const { model, queries } = byCharacter({})
    const task: Task = { ...choice, description: 'Say.\n', draw: 'first', exampleDelimiter: '\n', delimiter: '=' }
    const result = await evaluateTask(model, task, lines, { ...options, shots: 2, limit: 2 })
    expect(queries[0]).toEqual(['Say.\nq1:=b\nq2:=a\nq0:', '=a'])
    expect(queries[2]).toEqual(['Say.\nq0:=a\nq2:=a\nq1:', '=a'])
    expect(result).toMatchObject({ shots: 2, draw: 'first' })
    expect(result).not.toHaveProperty('seed')
  })

  test.each<[Task, string]>([
    [{ name: 'custom', kind: 'continuation', context: 'q', answer: 'a' }, 'q1 x\n\nq0'],
    [{ name: 'custom', kind: 'generation', context: 'q', answer: 'all' }, 'q1 y\n\nq0'],
    [{ name: 'custom', kind: 'generation', context: 'q', answer: 'a', delimiter: '' }, 'q1x\n\nq0'],
  ])('have the answer, or the first of several, after the delimiter: %j', async (task, prompt) => {
    const { model, queries } = byCharacter({})
    const items = ['q0', 'q1'].map(q => ({ q, a: 'x', all: ['y', 'z'] }))
    const result = await evaluateTask(model, task, items, { ...options, shots: 1, limit: 1 })
    expect(queries[0][0]).toBe(prompt)
    expect(result).toMatchObject({ shots: 1, draw: 'each', seed: 0 })
  })

  test('are drawn from the seed, and from a separate source if given', async () => {
    const prompts = async (more: Partial<EvaluateTaskOptions>) => {
      const { model, queries } = byCharacter({})
      await evaluateTask(model, choice, lines, { ...options, shots: 3, ...more })
      return queries.map(([before]) => before)
    }
    expect(await prompts({ seed: 1 })).toEqual(await prompts({ seed: 1 }))
    expect(await prompts({ seed: 1 })).not.toEqual(await prompts({ seed: 2 }))
    // A limit does not change the examples of the items before it.
    expect(await prompts({ limit: 2 })).toEqual((await prompts({})).slice(0, 4))
    const examples = Array.from({ length: 3 }, (_, i) => ({ q: `e${i}`, c: ['c', 'd'], a: 1 }))
    const all = await prompts({ examples, draw: 'once' })
    const front = all[0].slice(0, all[0].indexOf('q0'))
    expect(front.split('\n\n').toSorted()).toEqual(['', 'e0: d', 'e1: d', 'e2: d'])
    for (const prompt of all) expect(prompt.startsWith(front)).toBe(true)
  })
})

test('templates keep line feeds and indents around blocks, and a description without a template is literal', async () => {
  const { model, queries } = byCharacter({})
  const task: Task = {
    name: 'custom',
    kind: 'continuation',
    description: 'Answer {"a": 1}.\n',
    context:
      '{% set last = namespace(at=0) %}{% if who %}Who: {{who}}{% endif %}\n  {% for one in all %}\n- {{one}}\n{% endfor %}\n',
    answer: 'a',
    delimiter: '=',
  }
  await evaluateTask(model, task, [{ who: 'b', all: ['x', 'y'], a: 'c' }], options)
  // As Jinja2 renders it with keep_trailing_newline, except that the space at the end of the context is scored.
  expect(queries.map(parts => parts.join(''))).toEqual(['Answer {"a": 1}.\nWho: b\n  \n- x\n\n- y\n\n=c'])
})

test('items may come from several files, of which each text file is one item', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'moe-evaluation-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const paths = ['a.txt', 'b.jsonl', 'empty.txt'].map(name => join(folder, name))
  for (const [i, text] of ['a\nb', '{"text":"c"}\n{"text":"d"}', ''].entries()) await writeFile(paths[i], text)
  const found: string[] = []
  for (const sources of [paths, [pathToFileURL(paths[0])]])
    await evaluateTask(byCharacter({}).model, tasks.text, sources, {
      ...options,
      onItem: ({ location }) => found.push(location.slice(folder.length + 1)),
    })
  expect(found.slice(0, 3)).toEqual(['a.txt', 'b.jsonl:1', 'b.jsonl:2'])
  expect(found).toHaveLength(4)
})

test('files may have more items than a function call can have arguments', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'moe-evaluation-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const path = join(folder, 'items.jsonl')
  await writeFile(path, '{"text":"a"}\n'.repeat(200_000))
  const { items } = await evaluateTask(byCharacter({}).model, tasks.text, path, { ...options, limit: 1 })
  expect(items).toBe(1)
})

test('long texts are scored in parts, with limited memory', async () => {
  const sizes: number[] = []
  const { model } = byCharacter({})
  const counting = {
    ...model,
    score: (async (texts, { onProgress } = {}) => {
      sizes.push(texts.reduce((sum, { length }) => sum + length, 0))
      onProgress?.(0.5)
      const scored = { token: 0, logProb: -1, top: [] }
      return texts.map(({ length }) => new Array(length).fill(scored, 1))
    }) as typeof model.score,
  }
  const progress: number[] = []
  const onProgress = (done: number) => progress.push(done)
  const items = [{ text: 'a'.repeat(1_700_000) }, { text: 'b'.repeat(500_000) }]
  const { metrics } = await evaluateTask(counting, tasks.text, items, { ...options, onProgress })
  expect(metrics.bits_per_byte.value).toBeCloseTo(1 / Math.LN2, 12)
  expect(sizes.length).toBe(2)
  expect(Math.max(...sizes)).toBeLessThanOrEqual(2 ** 21)
  expect(progress).toEqual(progress.toSorted((a, b) => a - b))
  expect(progress[1]).toBeGreaterThan(0.5)
})

describe('invalid input', () => {
  const { model } = byCharacter({ a: 1 })
  const of = (task: unknown, items: unknown, more: object = {}) =>
    evaluateTask(model, task as Task, items as never, { ...options, ...more })

  async function file(text: string): Promise<string> {
    const folder = await mkdtemp(join(tmpdir(), 'moe-evaluation-'))
    onTestFinished(() => rm(folder, { recursive: true }))
    const path = join(folder, 'items.jsonl')
    await writeFile(path, text)
    return path
  }
  const valid = JSON.stringify({ goal: 'g', sol1: 'a', sol2: 'b', label: 0 })

  test.each([
    [`${valid}\n\n{"goal": \n`, 'items.jsonl:3: invalid JSON'],
    [`${valid}\n[1]`, 'items.jsonl:2: the item is '],
    [`${valid}\nnull`, 'items.jsonl:2: the item is null, expected an object'],
    [
      `${valid}\n{"goal":"g","sol1":"a","label":0}`,
      'items.jsonl:2: the field sol2 is missing, which choices of the task uses; the item has goal, sol1, label',
    ],
    [
      `${valid}\n{"goal":"g","sol1":"a","sol2":"b"}`,
      'items.jsonl:2: the field label is missing, which answer of the task uses',
    ],
    [
      `${valid}\n{"goal":"g","sol1":"a","sol2":"b","label":2}`,
      'items.jsonl:2: the answer is 2, but there are 2 choices',
    ],
    [`${valid}\n{"goal":"g","sol1":"a","sol2":"b","label":-1}`, 'items.jsonl:2: the answer is -1'],
    [`${valid}\n{"goal":"g","sol1":"a","sol2":"b","label":0.5}`, 'items.jsonl:2: the answer is 0.5'],
    [`${valid}\n{"goal":"g","sol1":"a","sol2":"b","label":""}`, 'items.jsonl:2: the answer is ""'],
    [`${valid}\n{"goal":"g","sol1":"a","sol2":"b","label":[0]}`, 'items.jsonl:2: answer is '],
    [`${valid}\n{"goal":"g","sol1":"a","sol2":{},"label":0}`, 'items.jsonl:2: choices[1] is '],
    [`${valid}\n{"goal":"g","sol1":"a","sol2":"","label":0}`, 'items.jsonl:2: choice 1 is empty'],
    [`${valid}\n{"goal":"g","sol1":"","sol2":"b","label":0}`, 'items.jsonl:2: choice 0 is empty'],
    [`${valid}\r\n \r\n{}`, 'items.jsonl:3: the field goal is missing'],
    ['', 'items.jsonl: there are no items'],
    ['\n\n', 'items.jsonl: there are no items'],
    ['\uFFFD', 'items.jsonl:1: invalid JSON'],
  ])('an invalid file is an error: %j', async (text, message) => {
    await expect(of(tasks.piqa, await file(text))).rejects.toMatchObject({ code: 'E_DATA' })
    await expect(of(tasks.piqa, await file(text))).rejects.toThrow(message)
  })

  test.each<[keyof typeof tasks, object, string]>([
    [
      'hellaswag',
      { ctx_a: 'a', ctx_b: 'b', activity_label: 'c', endings: [], label: 0 },
      'item 0: choices: the list endings is missing',
    ],
    [
      'hellaswag',
      { ctx_a: 'a', activity_label: 'c', endings: ['d'], label: 0 },
      'item 0: context: the field ctx_b is missing',
    ],
    [
      'arc_easy',
      { question: 'q', choices: { text: ['a'] }, answerKey: 'A' },
      'item 0: context: the list choices.label is missing',
    ],
    [
      'arc_easy',
      { question: 'q', choices: { text: ['a'], label: ['A'] }, answerKey: 'B' },
      'the answer is "B", but the labels are A',
    ],
    [
      'arc_easy',
      { question: 7, choices: [{ text: 'a', label: 'A' }], answerKey: 'A' },
      'question is 7, expected a text',
    ],
    ['winogrande', { sentence: 'no blank', option1: 'a', option2: 'b', answer: '1' }, 'context: sentence has no blank'],
    [
      'winogrande',
      { sentence: 'a _ b', option1: 'a', option2: 'b', answer: '' },
      'the answer is "", but the labels are 1, 2',
    ],
    ['mmlu', { question: 'q', subject: 's', choices: ['a'], answer: 0 }, 'context: expected 4 choices, got 1'],
    [
      'mmlu',
      { question: 'q', choices: ['a', 'b', 'c', 'd'], answer: 0 },
      'item 0: the field subject is missing, which group of the task uses',
    ],
    ['gsm8k', { question: 'q' }, 'the field answer is missing, which answer of the task uses'],
    ['text', { page: 'p' }, 'the field text is missing, which text of the task uses; the item has page'],
  ])('an invalid item of %s is an error: %j', async (name, item, message) => {
    await expect(of(tasks[name], [item], { shots: 0 })).rejects.toThrow(message)
  })

  test('is reported before the model has worked on other items', async () => {
    const item = { q: 'q', c: ['a', 'b'], a: 0, g: 'law' }
    const choice: ChoiceTask = { name: 'custom', kind: 'choice', context: 'q', choices: 'c', answer: 'a', group: 'g' }
    const items = Array.from({ length: 300 }, () => ({ ...item }))
    const more = { examples: [item], shots: 1 }
    for (const [last, message] of [
      [{ ...item, a: 2 }, 'item 300: the answer is 2, but there are 2 choices'],
      [{ ...item, g: 'art' }, 'item 300: shots is 1, but there are only 0 other items in the group art'],
    ] as const) {
      const { model, queries } = byCharacter({})
      await expect(evaluateTask(model, choice, [...items, last], { ...options, ...more })).rejects.toThrow(message)
      expect(queries).toEqual([])
      await evaluateTask(model, choice, [...items, last], { ...options, ...more, limit: 1 })
    }
  })

  test('invalid tasks and options are errors', async () => {
    const item = { q: 'q', c: ['a', 'b'], a: 0 }
    const choice = { name: 'custom', kind: 'choice', context: 'q', choices: 'c', answer: 'a' }
    await expect(of(undefined, [item])).rejects.toThrow(
      'kind of the task is undefined; use one of choice, continuation',
    )
    await expect(of({ ...choice, kind: 'quiz' }, [item])).rejects.toMatchObject({ code: 'E_CONFIG' })
    await expect(of({ ...choice, context: 7 }, [item])).rejects.toThrow('context of the task is 7; pass the name')
    await expect(of({ ...choice, context: '{{ q' }, [item])).rejects.toThrow(
      'context of the task is not a valid template',
    )
    await expect(of({ ...choice, choices: 'q' }, [item])).rejects.toThrow('needs one context and a list of choices')
    await expect(of({ ...choice, choices: '{{ c[0] }}' }, [item])).rejects.toThrow('needs one context and a list')
    await expect(
      of(
        {
          ...choice,
          context: () => {
            throw new Error('ow')
          },
        },
        [item],
      ),
    ).rejects.toThrow('item 0: context: ow')
    await expect(of({ ...choice, context: '{% set n = namespace(at=gone) %}' }, [item])).rejects.toThrow(
      'the field gone is missing',
    )
    await expect(of(choice, ['a.jsonl', item])).rejects.toThrow('item 0: the item is "a.jsonl"')
    await expect(of(choice, [])).rejects.toThrow('evaluateTask: there are no items')
    await expect(of(choice, 7)).rejects.toThrow('the items are 7; pass the path of a .jsonl file')
    await expect(of(choice, [7])).rejects.toThrow('item 0: the item is 7, expected an object')
    await expect(of(choice, '/nowhere/items.jsonl')).rejects.toThrow('/nowhere/items.jsonl: cannot read the file')
    await expect(of(choice, [item], { shots: 1 })).rejects.toThrow('shots is 1, but there are only 0 other items')
    await expect(of(choice, [item], { shots: -1 })).rejects.toThrow('shots = -1; pass 0 or more')
    await expect(of(choice, [item], { limit: 0 })).rejects.toThrow('limit = 0; pass 1 or more')
    await expect(of(choice, [item], { draw: 'all' })).rejects.toThrow('draw = "all"; use one of each, once, first')
    await expect(of(choice, [item], { shot: 1 })).rejects.toThrow('did you mean shots?')
    await expect(of(choice, [item], { tokenizer: undefined })).rejects.toThrow('the tokenizer is missing')
    await expect(of(tasks.text, [{ text: 'a' }], { shots: 1 })).rejects.toThrow(
      'text is a text task, which has no examples',
    )
    await expect(evaluateTask({} as never, tasks.text, [{ text: 'a' }], options)).rejects.toThrow('has no score()')
  })
})

test('readTask reads the same task as an object, and rejects invalid files', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'moe-evaluation-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const path = join(folder, 'task.json')
  const task = {
    name: 'letters',
    kind: 'choice',
    description: 'About {{about}}.\n',
    context: '{{ question.strip() }}\n{% for c in options %}{{ c.label }}. {{ c.text }}\n{% endfor %}Answer:\n',
    choices: ['A', 'B'],
    labels: ['A', 'B'],
    answer: 'key.letter',
  }
  await writeFile(path, JSON.stringify(task))
  const read = await readTask(path)
  expect(read).toEqual(task)
  const { model, queries } = byCharacter({})
  const item = {
    about: 'it',
    question: ' Q? ',
    options: [
      { label: 'A', text: 'a' },
      { label: 'B', text: 'b' },
    ],
    key: { letter: 'B' },
  }
  const items: ItemResult[] = []
  await evaluateTask(model, read, [item], { ...options, onItem: one => items.push(one) })
  expect(queries).toEqual([
    ['About it.\nQ?\nA. a\nB. b\nAnswer:', '\n A'],
    ['About it.\nQ?\nA. a\nB. b\nAnswer:', '\n B'],
  ])
  expect(items[0].answer).toBe(1)
  for (const [broken, message] of [
    ['{', 'cannot read the task: '],
    ['[]', 'invalid task: '],
    [JSON.stringify({ ...task, kind: 'quiz' }), 'kind'],
    [JSON.stringify({ ...task, answer: undefined, shot: 1 }), 'answer'],
    [JSON.stringify({ ...task, answer: undefined, shot: 1 }), 'shot'],
    [JSON.stringify({ ...task, choices: [] }), 'choices'],
  ]) {
    await writeFile(path, broken)
    await expect(readTask(path)).rejects.toThrow(message)
    await expect(readTask(path)).rejects.toMatchObject({ code: 'E_CONFIG', op: path })
  }
  await expect(readTask(join(folder, 'none.json'))).rejects.toThrow('cannot read the task: ENOENT')
})

describe('a model', () => {
  const backend = referenceBackend()
  const tokenizer = trainBpe(['the better angels of our nature, the people and their house'], {
    vocabSize: 290,
    minFrequency: 1,
  })
  let model: DeepSeek
  beforeAll(() => {
    setDefaultBackend(backend)
    const config = { ...presets.tiny, vocab_size: 300, hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 2 }
    const experts = { moe_intermediate_size: 8, n_routed_experts: 8, intermediate_size: 32, initializer_range: 0.3 }
    const sizes = { q_lora_rank: 12, kv_lora_rank: 8, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 8 }
    model = new DeepSeek(
      { ...config, ...experts, ...sizes, max_position_embeddings: 40, bos_token_id: 299, eos_token_id: 298 },
      { seed: 3 },
    )
  })
  afterAll(() => model.dispose())

  /** The log-probabilities `[T, V]` of the next token after each token, in float64, from a separate forward pass. */
  async function logProbsOf(ids: readonly number[]): Promise<number[][]> {
    const logits = model.infer(() => model.forward(fromHost(Int32Array.from(ids), [1, ids.length], 'i32', backend)))
    const values = await logits.values()
    logits.dispose()
    return ids.map((_, t) => {
      const row = Array.from(values.subarray(t * 300, (t + 1) * 300))
      const largest = Math.max(...row)
      const sum = row.reduce((sum, x) => sum + Math.exp(x - largest), 0)
      return row.map(x => x - largest - Math.log(sum))
    })
  }

  const sumOf = async (ids: readonly number[], from: number) => {
    const rows = await logProbsOf(ids.slice(0, -1))
    return ids.slice(from).reduce((sum, id, i) => sum + rows[from + i - 1][id], 0)
  }

  test('scores choices as single forward passes do', async () => {
    const items: ItemResult[] = []
    const lines = [
      'the better',
      'our nature, the people and their house of the better angels of our nature and who they were then, or will be',
    ].map(goal => ({ goal, sol1: 'angels of the house', sol2: 'people', label: 1 }))
    const result = await evaluateTask(model, { ...tasks.piqa, context: 'goal' }, lines, {
      tokenizer,
      onItem: item => items.push(item),
    })
    for (const [i, { goal, sol1, sol2 }] of lines.entries()) {
      const expected = [sol1, sol2].map(choice => {
        const ids = Array.from(tokenizer.encode(`${goal} ${choice}`))
        const count = ids.length - tokenizer.encode(goal).length
        const read = ids.slice(-41)
        return sumOf(read, read.length - count)
      })
      const sums = await Promise.all(expected)
      for (const [c, logProb] of (items[i].logProbs ?? []).entries()) expect(logProb).toBeCloseTo(sums[c], 3)
      expect(items[i].chosen).toBe(sums[0] >= sums[1] ? 0 : 1)
    }
    expect(items.map(({ truncated }) => truncated)).toEqual([false, true])
    expect(result.truncated).toBe(1)
  })

  test('scores a long text in windows, after its begin token', async () => {
    const text = 'the people of the house and the angels of our better nature '.repeat(6)
    const ids = Array.from(tokenizer.encode(text))
    expect(ids.length).toBeGreaterThan(80)
    const all = [299, ...ids]
    let nats = 0
    for (let start = 0; start + 1 < all.length; start += 40) {
      const end = Math.min(all.length, start + 41)
      const first = Math.max(0, end - 41)
      nats -= await sumOf(all.slice(first, end), start + 1 - first)
    }
    const { metrics } = await evaluateTask(model, tasks.text, [{ text }], { tokenizer })
    expect(metrics.bits_per_byte.value).toBeCloseTo(nats / text.length / Math.LN2, 4)
  })

  test('generates the same text as generate()', async () => {
    const context = 'the better angels'
    const made: number[] = []
    for await (const id of model.generate(Array.from(tokenizer.encode(context)), { maxTokens: 6 })) made.push(id)
    let text = ''
    for await (const part of model.generate(Array.from(tokenizer.encode(context)), { maxTokens: 6, tokenizer }))
      text += part
    const items: ItemResult[] = []
    const task: Task = { name: 'custom', kind: 'generation', context: 'q', answer: 'a', stop: [], maxTokens: 6 }
    const lines = [
      { q: context, a: text },
      { q: context, a: 'no' },
    ]
    const { metrics } = await evaluateTask(model, task, lines, { tokenizer, onItem: item => items.push(item) })
    expect(items[0].text).toBe(text)
    expect(metrics.exact_match.value).toBe(0.5)
  })

  test('has reproducible metrics, reports progress, and can be aborted by a signal', async () => {
    const { handles } = backend.stats()
    const lines = Array.from({ length: 300 }, (_, i) => ({
      goal: `the ${i % 7}`,
      sol1: 'angels',
      sol2: `${i}`,
      label: i % 2,
    }))
    const done: number[] = []
    const first = await evaluateTask(model, tasks.piqa, lines, { tokenizer, onProgress: share => done.push(share) })
    const second = await evaluateTask(model, tasks.piqa, lines, { tokenizer })
    expect({ ...second, seconds: 0 }).toEqual({ ...first, seconds: 0 })
    expect(done.at(-1)).toBe(1)
    expect(done).toEqual(done.toSorted((a, b) => a - b))
    expect(done.some(share => share > 0 && share < 0.9)).toBe(true)
    const controller = new AbortController()
    const onProgress = () => controller.abort(new Error('enough'))
    for (const task of [
      tasks.piqa,
      { ...tasks.gsm8k, context: 'goal', answer: 'sol1', shots: 0, maxTokens: 8 },
    ] as Task[]) {
      const ended = evaluateTask(model, task, lines, { tokenizer, signal: controller.signal, onProgress })
      await expect(ended).rejects.toMatchObject({ code: 'E_ABORTED' })
    }
    expect(backend.stats().handles).toBe(handles)
  })
})
