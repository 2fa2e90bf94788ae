/** @file Reads tasks from JSON files. */
import { MoeError } from '@moe/core'
import { z } from 'zod'
import type { Task } from './task.ts'

const field = z.string().min(1)
const list = z.union([field, z.array(z.string()).min(1)])
const front = {
  name: z.string().min(1),
  delimiter: z.string(),
  description: z.string(),
  shots: z.int().min(0),
  draw: z.enum(['each', 'once', 'first']),
  exampleDelimiter: z.string(),
  group: field,
}
const { name, ...optional } = front
const texts = z.strictObject({ name, ...z.object(optional).partial().shape })
const match = z
  .strictObject({
    extract: z.string(),
    pick: z.enum(['first', 'last']),
    ignore: z.array(z.string()),
    ignoreCase: z.boolean(),
    ignorePunctuation: z.boolean(),
  })
  .partial()

const schema = z.discriminatedUnion('kind', [
  texts.extend({ kind: z.literal('choice'), context: field, choices: list, answer: field, labels: list.optional() }),
  texts.extend({ kind: z.literal('continuation'), context: field, answer: field }),
  texts.extend({
    kind: z.literal('generation'),
    context: field,
    answer: field,
    stop: z.array(z.string().min(1)).optional(),
    maxTokens: z.int().min(1).optional(),
    matches: z.record(z.string().min(1), match).optional(),
  }),
  z.strictObject({ kind: z.literal('text'), name, text: field, group: field.optional() }),
])

/**
 * Reads a task from a JSON file, which has the properties of a `Task`, with field names and templates only (no functions).
 * @throws MoeError E_CONFIG for an invalid task, with all faults in one message
 */
export async function readTask(path: string | URL): Promise<Task> {
  const { readFile } = await import('node:fs/promises')
  const configError = (problem: string, cause?: unknown) =>
    new MoeError({ code: 'E_CONFIG', op: String(path), problem, cause })
  let json: unknown
  try {
    json = JSON.parse((await readFile(path, 'utf8')).replace(/^\uFEFF/, ''))
  } catch (cause) {
    throw configError(`cannot read the task: ${(cause as Error).message}`, cause)
  }
  const { success, data, error } = schema.safeParse(json)
  if (success) return data
  const faults = error.issues.map(({ path: at, message }) => `${at.join('.') || 'the file'}: ${message}`)
  throw configError(`invalid task: ${faults.join('; ')}`)
}
