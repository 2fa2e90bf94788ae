/** @file The arguments of `moe-evaluate`. */
import { statSync } from 'node:fs'
import { relative } from 'node:path'
import { parseArgs } from 'node:util'
import { precisions, type WeightFormat } from '@moe/core'
import { findFiles } from '@moe/trainer'
import type { Task } from './task.ts'
import { readTask } from './task-file.ts'
import { tasks } from './tasks.ts'

/** A wrong command line. */
export class UsageError extends Error {}

export type Options = ReturnType<typeof readArguments>

/** A task to evaluate. */
export interface RequestedTask {
  readonly name: string
  readonly task: Task
  readonly files: readonly string[]
  readonly examples: readonly string[] | undefined
}

/** Parses the command line. @throws UsageError, or an error of Node with a code ERR_PARSE_ARGS_… */
export function readArguments(args: string[]) {
  const { values, positionals } = parseArgs({
    args,
    allowPositionals: true,
    options: {
      task: { type: 'string', multiple: true, default: [] },
      examples: { type: 'string', multiple: true, default: [] },
      shots: { type: 'string' },
      draw: { type: 'string' },
      seed: { type: 'string' },
      limit: { type: 'string' },
      weights: { type: 'string' },
      precision: { type: 'string' },
      bos: { type: 'string' },
      'max-texts': { type: 'string' },
      threads: { type: 'string' },
      ranks: { type: 'boolean', default: false },
      items: { type: 'string' },
      json: { type: 'boolean', default: false },
      quiet: { type: 'boolean', default: false },
      version: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  })
  const number = (name: 'shots' | 'seed' | 'limit' | 'max-texts' | 'threads', least: number) => {
    const text = values[name]
    if (text === undefined) return undefined
    const value = Number(text)
    if (/^\d+$/.test(text) && value >= least && Number.isSafeInteger(value)) return value
    throw new UsageError(`--${name} is "${text}", expected an integer of at least ${least}`)
  }
  const oneOf = <T extends string>(name: 'weights' | 'precision' | 'draw', known: readonly T[]) => {
    const value = known.find(choice => choice === values[name])
    if (values[name] === undefined || value !== undefined) return value
    throw new UsageError(`--${name} is "${values[name]}", expected one of ${known.join(', ')}`)
  }
  return {
    ...values,
    positionals,
    shots: number('shots', 0),
    seed: number('seed', 0),
    limit: number('limit', 1),
    maxTexts: number('max-texts', 1),
    threads: number('threads', 1),
    draw: oneOf('draw', ['each', 'once', 'first'] as const),
    weights: oneOf<WeightFormat>('weights', ['bf16', 'fp8', 'int8', 'int4']),
    precision: oneOf('precision', precisions),
  }
}

/** Parses `NAME=FILE` arguments. */
function pairs(option: string, given: readonly string[]): Array<readonly [name: string, file: string]> {
  return given.map(text => {
    const at = text.indexOf('=')
    if (at > 0 && at < text.length - 1) return [text.slice(0, at), text.slice(at + 1)]
    throw new UsageError(`--${option} is "${text}", expected NAME=FILE`)
  })
}

/**
 * The model's folder, and the tasks with their files.
 * @throws UsageError
 * @throws MoeError E_DATA if files are missing
 */
export async function requestOf(options: Options): Promise<{ folder: string; tasks: readonly RequestedTask[] }> {
  const { positionals, shots } = options
  const [folder] = positionals
  if (folder === undefined) throw new UsageError('missing FOLDER')
  if (positionals.length > 1) throw new UsageError(`expected one FOLDER, got ${positionals.length}`)
  const tasks = await requestedTasks(options)
  const withoutExamples = tasks.find(({ task }) => task.kind === 'text')
  if (shots && withoutExamples)
    throw new UsageError(`--shots: ${withoutExamples.name} is a text task, which has no examples`)
  return { folder, tasks }
}

async function requestedTasks(options: Options): Promise<RequestedTask[]> {
  const given = pairs('task', options.task)
  if (given.length === 0) throw new UsageError('missing --task NAME=FILE')
  const examples = new Map<string, string>()
  for (const [name, file] of pairs('examples', options.examples)) {
    if (!given.some(([known]) => known === name)) throw new UsageError(`--examples ${name}: no --task has this name`)
    if (examples.has(name)) throw new UsageError(`--examples ${name} is given twice: pass a pattern of files`)
    examples.set(name, file)
  }
  const taskNamed = async (name: string): Promise<Task> => {
    if (Object.hasOwn(tasks, name)) return tasks[name as keyof typeof tasks]
    if (name.endsWith('.json')) return readTask(name)
    throw new UsageError(`unknown task ${name}, expected one of ${Object.keys(tasks).join(', ')} or a .json file`)
  }
  return Promise.all(
    given.map(async ([name, file]) => {
      const pattern = examples.get(name)
      return {
        name,
        task: await taskNamed(name),
        files: filesOf(`--task ${name}`, file),
        examples: pattern === undefined ? undefined : filesOf(`--examples ${name}`, pattern),
      }
    }),
  )
}

/** The files of a path or pattern, as paths from the current folder. */
function filesOf(option: string, pattern: string): string[] {
  if (statSync(pattern, { throwIfNoEntry: false })?.isFile()) return [pattern]
  return findFiles(option, pattern, process.cwd()).map(path => relative('', path))
}

/** Whether this is the first of the processes that `mpirun` or `srun` has started, or the only one. */
export function isFirstProcess(environment: NodeJS.ProcessEnv): boolean {
  const names = ['OMPI_COMM_WORLD_RANK', 'PMI_RANK', 'SLURM_PROCID']
  return Number(names.map(name => environment[name]).find(rank => rank !== undefined) ?? 0) === 0
}
