// Measures the time of decoding one token by context length, and the size of the latent cache:
//
//   node packages/deepseek/scripts/decode-cost.ts [--preset 200m] [--tokens 24] [--contexts 256,1024,4096] [--cache f32|bf16]
//
// The cache is filled with random rows, so that no long prompt must be computed. Prints a table and one line of JSON; asserts nothing.
import { parseArgs } from 'node:util'
import { cacheCost } from '@moe/attention-mla'
import { firstAvailable, fromHost, Random, randn, scope, setDefaultBackend } from '@moe/core'
import { DeepSeek, presets } from '../src/index.ts'

const { values: flags } = parseArgs({
  options: {
    preset: { type: 'string', default: '200m' },
    tokens: { type: 'string', default: '24' },
    contexts: { type: 'string', default: '256,1024,4096' },
    cache: { type: 'string', default: 'f32' },
  },
})
setDefaultBackend(await firstAvailable([() => import('@moe/kernels-cpu'), () => import('@moe/core/reference')]))
const name = flags.preset as keyof typeof presets
const tokens = Number(flags.tokens)
const dtype = flags.cache === 'bf16' ? 'bf16' : 'f32'
const model = new DeepSeek(presets[name], { seed: 1 })
const { config } = model
const { bytes, expandedBytes } = cacheCost(config, config.num_hidden_layers, dtype)
console.log(
  `${name} on ${model.backend.name}: cache ${bytes} bytes per token in ${dtype} (expanded keys and values: ${expandedBytes})`,
)

/** Returns the milliseconds of each of `tokens` decoding steps after a context. */
async function measure(context: number): Promise<number[]> {
  const cache = model.makeCache({ dtype, capacity: 2 ** Math.ceil(Math.log2(context + tokens + 4)) })
  const random = new Random(context)
  scope(() => {
    for (let layer = 0; layer < config.num_hidden_layers; layer++) {
      cache.write(layer, randn([1, context, cache.features], random))
    }
  })
  cache.advance(context)
  const times: number[] = []
  for (let i = 0; i < tokens + 3; i++) {
    const start = performance.now()
    const logits = model.infer(() => model.forward(fromHost(Int32Array.of(i % 100), [1, 1], 'i32'), { cache }))
    await logits.values()
    logits.dispose()
    times.push(performance.now() - start)
  }
  cache.dispose()
  return times.slice(3)
}

const median = (values: number[]) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]
const found = []
for (const context of flags.contexts.split(',').map(Number)) {
  const times = await measure(context)
  found.push({ context, median: median(times), fastest: Math.min(...times) })
}
for (const { context, median, fastest } of found) {
  const times = (median / found[0].median).toFixed(2)
  console.log(
    `context ${String(context).padStart(5)}: median ${median.toFixed(1)} ms, fastest ${fastest.toFixed(1)} ms per token (${times} x)`,
  )
}
console.log(JSON.stringify({ preset: name, backend: model.backend.name, dtype, cacheBytes: bytes, found }))
model.dispose()
