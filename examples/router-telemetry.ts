/**
 * @file Load balancing of a single MoE layer on skewed data: the expert load without balancing, and with DeepSeek-V3's balance bias, which
 * needs no loss term. Prints a row every few steps.
 */
import { firstAvailable, noGrad, Random, scope, setDefaultBackend, type Tensor, tensor } from '@moe/core'
import { MoELayer, summarizeLoad } from '@moe/router'
import { commandLine } from './command-line.ts'

commandLine({
  command: 'node examples/router-telemetry.ts',
  help: 'Prints the expert load of an MoE layer with and without the balance bias. It has no options.\n',
})

const backend = await firstAvailable([
  () => import('@moe/kernels-cuda'),
  () => import('@moe/kernels-cpu'),
  () => import('@moe/backend-tfjs'),
  () => import('@moe/core/reference'),
])
setDefaultBackend(backend)
console.log(`backend ${backend.name}\n`)

const hidden = 32
const experts = 16
const layer = () =>
  new MoELayer(
    {
      hidden_size: hidden,
      moe_intermediate_size: 16,
      n_routed_experts: experts,
      num_experts_per_tok: 2,
      n_shared_experts: 1,
    },
    { random: new Random(1), std: 0.3 },
  )

// Tokens come from 40 topics with frequencies 1 / (k + 1), so a few directions of the hidden space dominate.
const random = new Random(2)
const topics = Array.from({ length: 40 }, () => random.normal(hidden))
const weights = topics.map((_, k) => 1 / (k + 1))
const total = weights.reduce((sum, weight) => sum + weight, 0)

function drawTopic(): Float32Array {
  let rest = random.next() * total
  for (const [k, weight] of weights.entries()) {
    rest -= weight
    if (rest < 0) return topics[k]
  }
  return topics[0]
}

function tokens(count: number): Tensor {
  const values = random.normal(count * hidden, 0.6)
  for (let token = 0; token < count; token++) {
    const topic = drawTopic()
    for (let i = 0; i < hidden; i++) values[token * hidden + i] += topic[i]
  }
  return tensor(values, [8, count / 8, hidden])
}

/** One step: a forward pass that counts loads, then an update of the bias. */
async function step(moe: MoELayer, x: Tensor, speed: number) {
  noGrad(() => scope(() => moe.forward(x, { training: true }))).dispose()
  const load = summarizeLoad((await moe.load?.values()) ?? [])
  moe.updateBias({ speed })
  return load
}

const bar = (vio: number) => '#'.repeat(Math.round(vio * 20))
const balanced = layer()
const unbalanced = layer()
let first = 0
let last = 0
console.log('step   no balancing          aux-free bias')
console.log('       MaxVio  dead  hot     MaxVio  dead  hot  bias range')
for (let n = 0; n <= 160; n++) {
  const x = tokens(1024)
  const without = await step(unbalanced, x, 0)
  // Start fast, then slow down: the larger γ is, the more the bias oscillates around its target.
  const withBias = await step(balanced, x, n < 80 ? 0.01 : 0.002)
  x.dispose()
  if (n === 0) first = withBias.maxVio
  last = withBias.maxVio
  if (n % 20 !== 0) continue
  const bias = (await balanced.gate.e_score_correction_bias?.values()) ?? []
  const range = Math.max(...bias) - Math.min(...bias)
  const cells = (load: typeof without) =>
    `${load.maxVio.toFixed(2).padStart(6)}  ${String(load.dead.length).padStart(4)}  ${String(load.hot.length).padStart(3)}`
  console.log(
    `${String(n).padStart(4)}   ${cells(without)}     ${cells(withBias)}  ${range.toFixed(2).padStart(10)}  ${bar(withBias.maxVio)}`,
  )
}
console.log(`\nMaxVio fell from ${first.toFixed(2)} to ${last.toFixed(2)}`)
if (!(last < first / 2)) process.exitCode = 1
