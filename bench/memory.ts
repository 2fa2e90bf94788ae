/**
 * Memory and time of a training step by context length, compared with PyTorch.
 *
 *     pnpm bench memory [--config 12m] [--precision bf16] [--seq 256,1024,4096] [--tokens 4096] [--rounds N] [--json FILE] [--no-peers]
 *
 * Shows peak memory, and the time without attention; PyTorch requires `.venv-reference`. The number of tokens per step
 * is constant and only the sequences grow, so everything except attention should take the same time. Peak memory is the
 * maximum resident memory of the process, including parameters, moments and the runtime itself. `engine` is all time
 * outside of kernels: replaying the step, the host's part of it, and waiting.
 */
import { parseArgs } from 'node:util'
import { findPython, lastJson, median, millisecondsOf, printTable, root, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    config: { type: 'string', default: '12m' },
    precision: { type: 'string', default: 'bf16' },
    seq: { type: 'string', default: '256,1024,4096' },
    tokens: { type: 'string', default: '4096' },
    rounds: { type: 'string', default: '2' },
    steps: { type: 'string', default: '3' },
    json: { type: 'string' },
    peers: { type: 'boolean', default: true },
  },
  allowNegative: true,
})

/** The result of one process of `bench train`. */
interface Measurement {
  readonly seconds: readonly number[]
  readonly peakMemoryBytes: number
  readonly ops?: Readonly<Record<string, number>>
}

const common = ['--config', options.config, '--tokens', options.tokens, '--steps', options.steps]

function ours(seq: string): Measurement {
  const args = ['--worker', '--profile', '--precision', options.precision, '--seq', seq]
  return lastJson(`@moe ${seq}`, process.execPath, [`${root}bench/train.ts`, ...args, ...common])
}

function torch(python: string, seq: string): Measurement {
  const args = [`${root}bench/peers/train_torch.py`, '--mode', options.precision, '--seq', seq, '--json']
  return lastJson(`PyTorch ${seq}`, python, [...args, ...common])
}

function summarize(who: string, seq: string, rounds: readonly Measurement[]) {
  const sum = (pattern: RegExp) => median(rounds.map(({ ops = {} }) => millisecondsOf(ops, pattern))) / 1000
  const seconds = median(rounds.flatMap(round => round.seconds))
  const peakMemoryBytes = Math.max(...rounds.map(round => round.peakMemoryBytes))
  if (rounds[0].ops === undefined) return { who, seq, seconds, peakMemoryBytes }
  const attention = sum(/attention/)
  const engine = sum(/^engine$/)
  return { who, seq, seconds, peakMemoryBytes, attention, rest: seconds - attention, engine }
}

const python = findPython(options.peers)
const measured = new Map<string, Measurement[]>()
const add = (key: string, value: Measurement) => measured.set(key, [...(measured.get(key) ?? []), value])
const lengths = options.seq.split(',')
for (let round = 0; round < Number(options.rounds); round++) {
  for (const seq of lengths) {
    add(`@moe ${seq}`, ours(seq))
    if (python !== undefined) add(`PyTorch ${seq}`, torch(python, seq))
  }
}
const results = [...measured].map(([key, rounds]) => summarize(key.split(' ')[0], key.split(' ')[1], rounds))
const firstOf = (who: string) => results.find(result => result.who === who)
console.log(`${options.config}, ${options.tokens} tokens per step, ${options.precision}`)
printTable(
  ['who', 'context', 'peak MiB', 's/step', 'attention', 'rest', 'rest grew', 'engine'],
  results.map(({ who, seq, seconds, peakMemoryBytes, attention, rest, engine }) => [
    who,
    seq,
    (peakMemoryBytes / 2 ** 20).toFixed(0),
    seconds.toFixed(3),
    attention?.toFixed(3) ?? '',
    rest?.toFixed(3) ?? '',
    rest === undefined ? '' : `${(rest / (firstOf(who)?.rest ?? rest)).toFixed(2)}x`,
    engine === undefined ? '' : `${((100 * engine) / seconds).toFixed(1)}%`,
  ]),
  2,
)
writeResults(options.json, { config: options.config, tokens: options.tokens, precision: options.precision, results })
