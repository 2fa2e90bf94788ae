/** @file Evaluates a model on a task. */
import { checkOptions, MoeError, type OptionNames, type Precision, shown } from '@moe/core'
import type { EvaluationTokenizer } from './encode.ts'
import { isTemplate, type PlacedItem, textReader } from './fields.ts'
import { type ItemSource, readItems } from './items.ts'
import type { Metric } from './metrics.ts'
import { abortedBy, BatchedQueries, type EvaluatedModel } from './model-queries.ts'
import { type ItemScore, type Scorer, scorerOf } from './scorers.ts'
import { Shots } from './shots.ts'
import type { ExampleDraw, Task, TaskTexts } from './task.ts'

/** Options of `evaluateTask`. */
export interface EvaluateTaskOptions {
  /** The model's tokenizer. */
  readonly tokenizer: EvaluationTokenizer
  /** The number of examples before each item (few-shot). Default: that of the task, or 0. */
  readonly shots?: number | undefined
  /** The source of the examples. Default: the other items of the task. */
  readonly examples?: ItemSource | undefined
  /** How examples are chosen. Default: that of the task, or `each`. */
  readonly draw?: ExampleDraw | undefined
  /** The seed for drawing examples. Default: 0. */
  readonly seed?: number | undefined
  /** Evaluate only the first `limit` items. Default: all. */
  readonly limit?: number | undefined
  /** The id at the start of every text; null for none. Default: what the tokenizer adds. */
  readonly bos?: number | null | undefined
  /** The id before a text without context, if `bos` and the tokenizer add none. Default: `bos_token_id` of the model, or its first end token. */
  readonly prefix?: number | undefined
  /** Arithmetic of matrix products. Default: bf16 if the weights are stored as bf16 or quantized, else f32. */
  readonly precision?: Precision | undefined
  /** The number of answers generated at the same time. Default: 8. */
  readonly maxTexts?: number | undefined
  /** Aborts the evaluation: the promise rejects with E_ABORTED. */
  readonly signal?: AbortSignal | undefined
  /** Called with the fraction of the work done, from 0 to 1. */
  readonly onProgress?: ((done: number) => void) | undefined
  /** Called with the result of each item, in the order of the items. */
  readonly onItem?: ((item: ItemResult) => void) | undefined
}

const names: OptionNames<EvaluateTaskOptions> = {
  tokenizer: true,
  shots: true,
  examples: true,
  draw: true,
  seed: true,
  limit: true,
  bos: true,
  prefix: true,
  precision: true,
  maxTexts: true,
  signal: true,
  onProgress: true,
  onItem: true,
}

/** The result of one item. */
export interface ItemResult extends ItemScore {
  /** The item's number, from 0. */
  readonly item: number
  /** Its file and line, or `item 0` and so on. */
  readonly location: string
  /** Its group, if the task has groups. */
  readonly group?: string
}

/** The metrics of a set of items. */
export interface Summary {
  /** Metrics by name. */
  readonly metrics: Readonly<Record<string, Metric>>
  /** The number of items. */
  readonly items: number
}

/** The result of a task. */
export interface TaskResult extends Summary {
  /** The task's name. */
  readonly task: string
  /** The metrics of each group, if the task has groups. */
  readonly groups?: Readonly<Record<string, Summary>>
  /** The number of examples before each item. */
  readonly shots: number
  /** How the examples were chosen; missing without examples. */
  readonly draw?: ExampleDraw
  /** The seed they were drawn with; missing if none were drawn. */
  readonly seed?: number
  /** The number of items whose texts were truncated on the left because they exceed the context. */
  readonly truncated: number
  /** Wall time. */
  readonly seconds: number
}

/** Items evaluated together: enough for full forward passes, few enough for frequent progress reports. */
const batchSize = 256

/**
 * Evaluates a model on a task: reads the items, queries the model, and computes the metrics that lm-evaluation-harness would. The model is not changed, so you can evaluate it
 * during training.
 * @param items the path of a `.jsonl` file with one object per line (of any other file, the whole text is one item), or the objects
 * @throws MoeError E_DATA with file and line for items that the task cannot read, E_CONFIG for an invalid task, E_ATTR for invalid options, E_ABORTED
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
  // Report invalid items before the model has worked on the others.
  for (const [i, item] of all.slice(0, count).entries()) {
    scorer.check(item)
    groupOf?.(item)
    preamble.of(item, i)
  }
  for (let start = 0; start < count; start += batchSize) {
    const some = all.slice(start, Math.min(count, start + batchSize))
    queries.onProgress = done => onProgress?.((start + done * some.length) / count)
    const scored = await scorer.score(
      some.map((item, i) => ({ item, preamble: preamble.of(item, start + i) })),
      queries,
    )
    for (const [i, one] of scored.entries()) {
      const result = {
        item: start + i,
        location: some[i].location,
        ...(groupOf && { group: groupOf(some[i]) }),
        ...one,
      }
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
    truncated: results.filter(({ truncated }) => truncated).length,
    seconds: (performance.now() - started) / 1000,
  }
}

function byGroup(results: readonly ItemResult[], summary: (some: readonly ItemResult[]) => Summary) {
  const groups = new Set(results.map(({ group }) => group as string))
  const of = (name: string) => summary(results.filter(({ group }) => group === name))
  return Object.fromEntries(Array.from(groups, name => [name, of(name)]))
}

/** The text before each item: the task's description and examples. */
async function preambleOf(task: Task, scorer: Scorer, all: readonly PlacedItem[], options: EvaluateTaskOptions) {
  const texts: Partial<Omit<TaskTexts, 'context'>> = task
  const { shots = texts.shots ?? 0, draw = texts.draw ?? 'each', seed = 0 } = options
  const { description = '', exampleDelimiter = '\n\n' } = texts
  const { solved } = scorer
  if (shots > 0 && solved === undefined)
    throw optionError(`${task.name} is a text task, which has no examples`, 'leave out shots')
  const groupOf = task.group === undefined ? () => '' : textReader('group', task.group)
  const pool = options.examples === undefined ? all : await readItems(options.examples, 'example')
  const examples = new Shots({ shots, draw, seed, pool, groupOf })
  const isPlain = typeof description === 'string' && !isTemplate(description)
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

/** @throws MoeError E_CONFIG for an invalid task, E_ATTR for invalid options */
function check(model: EvaluatedModel, task: Task, options: EvaluateTaskOptions): void {
  checkOptions('evaluateTask', options, names)
  const { limit = 1, shots = 0, draw = 'each', tokenizer } = options
  if (!kinds.includes(task?.kind)) {
    const problem = `kind of the task is ${shown(task?.kind)}`
    throw new MoeError({ code: 'E_CONFIG', op: 'evaluateTask', problem, fix: `use one of ${kinds.join(', ')}` })
  }
  if (typeof model?.score !== 'function') throw optionError('the model has no score()', 'pass a DeepSeek')
  if (typeof tokenizer?.encode !== 'function') {
    throw optionError(
      'the tokenizer is missing',
      "pass { tokenizer: await BpeTokenizer.fromFile(path) } of '@moe/tokenizer-bpe'",
    )
  }
  if (!(Number.isInteger(limit) && limit > 0) && limit !== Infinity)
    throw optionError(`limit = ${shown(limit)}`, 'pass 1 or more')
  if (!(Number.isInteger(shots) && shots >= 0)) throw optionError(`shots = ${shown(shots)}`, 'pass 0 or more')
  if (!draws.includes(draw)) throw optionError(`draw = ${shown(draw)}`, `use one of ${draws.join(', ')}`)
}

const optionError = (problem: string, fix: string) => new MoeError({ code: 'E_ATTR', op: 'evaluateTask', problem, fix })
