/** @file A model and a task: how good the one is at the other. */
import { checkOptions, MoeError, type OptionNames, type Precision, shown } from '@moe/core'
import type { EvaluationTokenizer } from './encode.ts'
import { type PlacedItem, textReader } from './fields.ts'
import { type ItemSource, readItems } from './items.ts'
import type { Metric } from './metrics.ts'
import { abortedBy, BatchedQueries, type EvaluatedModel } from './model-queries.ts'
import { type Judged, type Scorer, scorerOf } from './scorers.ts'
import { Shots } from './shots.ts'
import type { ExampleDraw, Task, TaskTexts } from './task.ts'

/** How a model is judged. */
export interface EvaluateTaskOptions {
  /** Makes ids of texts, and texts of ids. */
  readonly tokenizer: EvaluationTokenizer
  /** How many examples stand in preamble of each item. Default: what the task says, or 0. */
  readonly shots?: number
  /** Where examples come from. Default: the other items. */
  readonly examples?: ItemSource
  /** How they are chosen. Default: what the task says, or `each`. */
  readonly draw?: ExampleDraw
  /** Of the drawing; the same seed draws the same. Default 0. */
  readonly seed?: number
  /** Only so many items, the first. Default: all. */
  readonly limit?: number
  /** Id that stands in preamble of every text; null for none. Default: what the tokenizer puts there by itself. */
  readonly begin?: number | null
  /** Id that stands in preamble of what has no context, where nothing begins texts. Default: `bos_token_id` or `eos_token_id` of the model. */
  readonly prefix?: number
  /** Of matrix products. Default: bf16 where weights are stored in bf16 or fewer bits, else f32. */
  readonly precision?: Precision
  /** Answers that are written at a time. Default 8. */
  readonly maxTexts?: number
  /** Ends it: the promise then rejects with E_ABORTED. */
  readonly signal?: AbortSignal
  /** Is told which share is done, as it goes. */
  readonly onProgress?: (done: number) => void
  /** Is given what each item came to, in their order. */
  readonly onItem?: (item: ItemResult) => void
}

const names: OptionNames<EvaluateTaskOptions> = {
  tokenizer: true,
  shots: true,
  examples: true,
  draw: true,
  seed: true,
  limit: true,
  begin: true,
  prefix: true,
  precision: true,
  maxTexts: true,
  signal: true,
  onProgress: true,
  onItem: true,
}

/** What one item came to. */
export interface ItemResult extends Judged {
  /** Number of the item, from 0. */
  readonly item: number
  /** Its file and line, or `item 0` and so on. */
  readonly place: string
  /** Which part of the task it belongs to, if it has parts. */
  readonly group?: string
}

/** What some items came to. */
export interface Summary {
  /** Numbers by name. */
  readonly metrics: Readonly<Record<string, Metric>>
  /** How many items they are of. */
  readonly items: number
}

/** What a task came to. */
export interface TaskResult extends Summary {
  /** Name of the task. */
  readonly task: string
  /** Each part of the task, if it has parts. */
  readonly groups?: Readonly<Record<string, Summary>>
  /** Examples in preamble of each item. */
  readonly shots: number
  /** How they were chosen; left out without any. */
  readonly draw?: ExampleDraw
  /** Of that drawing. */
  readonly seed?: number
  /** Items whose texts lost tokens on the left, as they are longer than the context. */
  readonly cut: number
  /** Wall time. */
  readonly seconds: number
}

/** Items that are asked batchSize: enough for full passes, few enough to be told of soon. */
const batchSize = 256

/**
 * Judges a model by a task: reads its items, asks the model, and tells the numbers that lm-evaluation-harness would. Nothing is trained, and the model may be in the middle of
 * its training.
 * @param items the path of a `.jsonl` file, an object a line; or the objects
 * @throws MoeError E_DATA with file and line for items that the task cannot read; E_CONFIG for a task that is none; E_ABORTED
 */
export async function evaluateTask(
  model: EvaluatedModel,
  task: Task,
  items: ItemSource,
  options: EvaluateTaskOptions,
): Promise<TaskResult> {
  check(model, task, options)
  const started = performance.now()
  const { onItem, onProgress, signal, limit = Infinity } = options
  const all = await readItems(items, 'item')
  const scorer = scorerOf(task)
  const groupOf = task.group === undefined ? undefined : textReader('group', task.group)
  const preamble = await preambleOf(task, scorer, all, options)
  const queries = new BatchedQueries(model, options)
  const results: ItemResult[] = []
  const count = Math.min(limit, all.length)
  for (let start = 0; start < count; start += batchSize) {
    const some = all.slice(start, Math.min(count, start + batchSize))
    queries.onProgress = done => onProgress?.((start + done * some.length) / count)
    const scored = await scorer.score(
      some.map((item, i) => ({ item, preamble: preamble.of(item, start + i) })),
      queries,
    )
    for (const [i, one] of scored.entries()) {
      const result = { item: start + i, place: some[i].place, ...(groupOf && { group: groupOf(some[i]) }), ...one }
      results.push(result)
      onItem?.(result)
    }
    if (signal?.aborted) throw abortedBy(signal)
  }
  const summary = (some: readonly ItemResult[]): Summary => ({
    metrics: scorer.summarize(some.map(({ metrics }) => metrics)),
    items: some.length,
  })
  const { shots, draw, seed } = preamble
  return {
    task: task.name,
    ...summary(results),
    ...(groupOf && { groups: byGroup(results, summary) }),
    shots,
    ...(shots > 0 && { draw, ...(draw !== 'first' && { seed }) }),
    cut: results.filter(({ cut }) => cut).length,
    seconds: (performance.now() - started) / 1000,
  }
}

function byGroup(results: readonly ItemResult[], summary: (some: readonly ItemResult[]) => Summary) {
  const groups = new Set(results.map(({ group }) => group as string))
  const of = (name: string) => summary(results.filter(({ group }) => group === name))
  return Object.fromEntries(Array.from(groups, name => [name, of(name)]))
}

/** What stands in preamble of items: the task's description, and examples. */
async function preambleOf(task: Task, judge: Scorer, all: readonly PlacedItem[], options: EvaluateTaskOptions) {
  const texts: Partial<TaskTexts> = task.kind === 'text' ? {} : (task as Partial<TaskTexts>)
  const { shots = texts.shots ?? 0, draw = texts.draw ?? 'each', seed = 0 } = options
  const { description = '', exampleDelimiter = '\n\n' } = texts
  const { solved } = judge
  if (shots > 0 && solved === undefined)
    throw optionError(`the texts of ${task.name} have no examples`, 'leave shots out')
  const groupOf = task.group === undefined ? () => '' : textReader('group', task.group)
  const pool = options.examples === undefined ? all : await readItems(options.examples, 'example')
  const examples = new Shots({ shots, draw, seed, pool, groupOf })
  const isPlain = typeof description === 'string' && !description.includes('{')
  const describe = isPlain ? () => description : textReader('description', description)
  return {
    shots,
    draw,
    seed,
    of: (item: PlacedItem, number: number): string => {
      const before = examples.of(item, number).map(example => `${solved?.(example)}${exampleDelimiter}`)
      return describe(item) + before.join('')
    },
  }
}

const kinds = ['choice', 'continuation', 'generation', 'text']
const draws = ['each', 'once', 'first']

/** @throws MoeError E_CONFIG for what is no task, E_ATTR for options that cannot be */
function check(model: EvaluatedModel, task: Task, options: EvaluateTaskOptions): void {
  checkOptions('evaluateTask', options, names)
  const { limit = 1, shots = 0, draw = 'each', tokenizer } = options
  if (!kinds.includes(task?.kind)) {
    const problem = `kind of the task is ${shown(task?.kind)}`
    throw new MoeError({ code: 'E_CONFIG', op: 'evaluateTask', problem, fix: `it is one of ${kinds.join(', ')}` })
  }
  if (typeof model?.score !== 'function') throw optionError('the model has no score', 'pass a DeepSeek')
  if (typeof tokenizer?.encode !== 'function') {
    throw optionError(
      'there is no tokenizer',
      "pass { tokenizer: await BpeTokenizer.fromFile(path) } of '@moe/tokenizer-bpe'",
    )
  }
  if (!(Number.isInteger(limit) && limit > 0) && limit !== Infinity)
    throw optionError(`limit = ${shown(limit)}`, 'pass 1 or more')
  if (!(Number.isInteger(shots) && shots >= 0)) throw optionError(`shots = ${shown(shots)}`, 'pass 0 or more')
  if (!draws.includes(draw)) throw optionError(`draw = ${shown(draw)}`, `it is one of ${draws.join(', ')}`)
}

const optionError = (problem: string, fix: string) => new MoeError({ code: 'E_ATTR', op: 'evaluateTask', problem, fix })
