/** @file The arguments of `moe-serve`. */
import { parseArgs } from 'node:util'
import { precisions, type WeightFormat } from '@moe/core'

/** A wrong command line. */
export class UsageError extends Error {}

export type Options = ReturnType<typeof readArguments>

/** Parses the command line. @throws UsageError, or an error of Node with a code ERR_PARSE_ARGS_… */
export function readArguments(args: string[]) {
  const { values, positionals } = parseArgs({
    args,
    allowPositionals: true,
    allowNegative: true,
    options: {
      host: { type: 'string', default: '127.0.0.1' },
      port: { type: 'string', default: '8000' },
      'api-key': { type: 'string' },
      cors: { type: 'string', multiple: true },
      'body-limit': { type: 'string', default: '4' },
      name: { type: 'string' },
      'chat-template': { type: 'string' },
      weights: { type: 'string' },
      precision: { type: 'string' },
      'max-texts': { type: 'string' },
      'cache-tokens': { type: 'string' },
      cache: { type: 'string' },
      speculative: { type: 'boolean', default: false },
      chat: { type: 'boolean', default: false },
      threads: { type: 'string' },
      ranks: { type: 'boolean', default: false },
      json: { type: 'boolean', default: false },
      quiet: { type: 'boolean', default: false },
      version: { type: 'boolean', default: false },
      help: { type: 'boolean', short: 'h', default: false },
    },
  })
  type Numeric = 'port' | 'body-limit' | 'max-texts' | 'cache-tokens' | 'threads'
  const number = (name: Numeric, least: number, most: number, whole = true) => {
    const value = Number(values[name])
    const fits = values[name] !== '' && value >= least && value <= most && (!whole || Number.isInteger(value))
    if (!fits)
      throw new UsageError(
        `--${name} is "${values[name]}", expected ${whole ? 'an integer' : 'a number'} from ${least} to ${most}`,
      )
    return value
  }
  const optional = (name: Numeric, most: number) => (values[name] === undefined ? undefined : number(name, 1, most))
  const oneOf = <T extends string>(name: 'weights' | 'precision' | 'cache', known: readonly T[]) => {
    const value = known.find(choice => choice === values[name])
    if (values[name] !== undefined && value === undefined)
      throw new UsageError(`--${name} is "${values[name]}", expected one of ${known.join(', ')}`)
    return value
  }
  const [folder, ...more] = positionals
  if (more.length > 0) throw new UsageError(`expected one FOLDER, got ${positionals.length}`)
  return {
    ...values,
    folder,
    port: number('port', 0, 65535),
    bodyLimit: number('body-limit', 0.001, 1024, false) * 2 ** 20,
    maxTexts: optional('max-texts', 1024),
    cacheTokens: optional('cache-tokens', 2 ** 31),
    cache: oneOf('cache', ['f32', 'bf16'] as const),
    threads: optional('threads', 256),
    weights: oneOf<WeightFormat>('weights', ['bf16', 'fp8', 'int8', 'int4']),
    precision: oneOf('precision', precisions),
    apiKey: values['api-key'] ?? (process.env.MOE_API_KEY || undefined),
  }
}

/** Whether this is the first of the processes that `mpirun` or `srun` has started, or the only one. */
export function isFirstProcess(environment: NodeJS.ProcessEnv): boolean {
  const names = ['OMPI_COMM_WORLD_RANK', 'PMI_RANK', 'SLURM_PROCID']
  return Number(names.map(name => environment[name]).find(rank => rank !== undefined) ?? 0) === 0
}
