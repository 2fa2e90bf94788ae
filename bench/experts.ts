/**
 * Cost of a training step by number of experts, with the same number of active experts.
 *
 *     pnpm bench experts [--config 12m] [--precision bf16] [--experts 16,64,256] [--seq 256] [--tokens 2048] [--steps N] [--rounds N] [--json FILE]
 *
 * The optimizer, which updates all experts, is shown separately. Every measurement is a separate process, and they take
 * turns. `optimizer` is AdamW and the norm of all gradients. `grew` compares the rest of the step with the first number
 * of experts.
 */
import { parseArgs } from 'node:util'
import { lastJson, median, millisecondsOf, printTable, root, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    config: { type: 'string', default: '12m' },
    precision: { type: 'string', default: 'bf16' },
    experts: { type: 'string', default: '16,64,256' },
    seq: { type: 'string', default: '256' },
    tokens: { type: 'string', default: '2048' },
    steps: { type: 'string', default: '3' },
    rounds: { type: 'string', default: '3' },
    json: { type: 'string' },
  },
})

/** The result of one process of `bench train`. */
interface Measurement {
  readonly precision: string
  readonly parameters: number
  readonly seconds: readonly number[]
  readonly peakMemoryBytes: number
  /** Milliseconds per step. */
  readonly ops: Readonly<Record<string, number>>
}

const { config, precision, seq, tokens, steps } = options
const counts = options.experts.split(',')
const measured = new Map<string, Measurement[]>(counts.map(count => [count, []]))
for (let round = 0; round < Number(options.rounds); round++) {
  for (const count of counts) {
    const settings = Object.entries({ config, precision, seq, tokens, steps, experts: count })
    const args = ['--worker', '--profile', ...settings.flatMap(([name, value]) => [`--${name}`, value])]
    measured.get(count)?.push(lastJson(`${count} experts`, process.execPath, [`${root}bench/train.ts`, ...args]))
  }
}

const results = counts.map(count => {
  const rounds = measured.get(count) ?? []
  const of = (pattern: RegExp) => median(rounds.map(round => millisecondsOf(round.ops, pattern) / 1000))
  const seconds = median(rounds.flatMap(round => round.seconds))
  const optimizer = of(/adamw|global_norm/)
  const experts = of(/grouped_matmul/)
  const peakMemoryBytes = Math.max(...rounds.map(round => round.peakMemoryBytes))
  return {
    experts: Number(count),
    parameters: rounds[0].parameters,
    seconds,
    optimizer,
    products: experts,
    peakMemoryBytes,
  }
})
const rest = ({ seconds, optimizer }: { seconds: number; optimizer: number }) => seconds - optimizer
console.log(`${config}, ${tokens} tokens per step, ${measured.get(counts[0])?.[0].precision}`)
printTable(
  ['experts', 'parameters', 's/step', 'optimizer', 'rest', 'grew', 'of it experts', 'peak MiB'],
  results.map(result => [
    String(result.experts),
    `${(result.parameters / 1e6).toFixed(1)}M`,
    result.seconds.toFixed(3),
    result.optimizer.toFixed(3),
    rest(result).toFixed(3),
    `${(rest(result) / rest(results[0])).toFixed(2)}x`,
    result.products.toFixed(3),
    (result.peakMemoryBytes / 2 ** 20).toFixed(0),
  ]),
)
writeResults(options.json, {
  config,
  tokens: Number(tokens),
  precision: measured.get(counts[0])?.[0].precision,
  results,
})
