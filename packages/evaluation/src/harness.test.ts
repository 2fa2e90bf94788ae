import { readFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { evaluateTask, type Item, type Metric, type Task, tasks } from './index.ts'
import { characters, knownModel } from './test-model.ts'

interface Case {
  readonly task: keyof typeof tasks
  readonly shots: number
  readonly items: readonly Item[]
  readonly examples: readonly Item[]
  readonly asked: ReadonlyArray<readonly [context: string, scored: string]>
  readonly metrics: Readonly<Record<string, readonly [value: number, stderr: number | null]>>
}

const file = new URL('../fixtures/harness.json', import.meta.url)
const harness: { context: number; prefix: number; cases: readonly Case[] } = JSON.parse(readFileSync(file, 'utf8'))

/** The log-probabilities of tools/reference/evaluation_fixtures.py. */
const logProbOf = (before: number, token: number) => -(((before * 3 + token * 23) % 61) + 1) / 16
const letters = [32, ...Array.from({ length: 26 }, (_, i) => 97 + i)]
const codeOf = (character: string) => character.codePointAt(0) as number

function known(context: number) {
  return knownModel({
    context,
    logProb: (before, next) => logProbOf(codeOf(before.at(-1) as string), codeOf(next)),
    likeliest: text => {
      // The text that the fixture's model generates after a prompt, which ends with "Answer:".
      const prompt = text.slice(0, text.lastIndexOf('Answer:') + 'Answer:'.length)
      if (prompt.endsWith('Answer:') && isGenerating) {
        const { length } = Array.from(prompt)
        const all = `${prompt} ${length} is what it comes to.\n#### ${length % 3}\n\nQuestion: and so on`
        return all[text.length] ?? '\0'
      }
      const before = codeOf(text.at(-1) as string)
      const best = letters.reduce((best, one) => (logProbOf(before, one) > logProbOf(before, best) ? one : best))
      return String.fromCodePoint(best)
    },
  })
}
let isGenerating = false

test.each(harness.cases.map((one, i) => ({ ...one, i })))(
  'case $i, $task with $shots examples: queries and metrics equal those of lm-evaluation-harness',
  async one => {
    const { items, examples, shots } = one
    isGenerating = one.task === 'gsm8k'
    const task: Task = one.task === 'text' ? { ...tasks.text, text: 'page' } : tasks[one.task]
    // The fixture's model generates after prompts of any length.
    const { model, queries } = known(isGenerating ? 10_000 : harness.context)
    const result = await evaluateTask(model, task, items, {
      ...{ tokenizer: characters, bos: null, prefix: harness.prefix, shots },
      examples: shots > 0 ? examples : undefined,
    })
    expect(queries).toEqual(one.asked)
    for (const [name, [value, stderr]] of Object.entries(one.metrics)) {
      const own = result.metrics[name] as Metric
      expect(Math.abs(own.value - value), name).toBeLessThanOrEqual(1e-12 * Math.abs(value))
      // The harness estimates the standard error of a perplexity by bootstrapping.
      if (stderr === null || name === 'perplexity') expect(own.stderr === null, name).toBe(stderr === null)
      else expect(own.stderr, name).toBeCloseTo(stderr, 12)
    }
  },
)
