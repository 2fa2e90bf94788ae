/**
 * @file Multi-head Latent Attention inside a custom block. Prints the size of its cache, and verifies that decoding token by token with the
 * cache gives the same output as the full forward pass.
 */
import { LatentCache, type MlaConfig, type MlaForwardOptions, MultiHeadLatentAttention } from '@moe/attention-mla'
import {
  backward,
  firstAvailable,
  type InitOptions,
  Linear,
  Module,
  noGrad,
  Random,
  RmsNorm,
  randn,
  scope,
  setDefaultBackend,
  type Tensor,
  trainable,
} from '@moe/core'
import { commandLine } from './command-line.ts'

commandLine({
  command: 'node examples/mla-in-your-own-block.ts',
  help: 'Trains a custom block with Multi-head Latent Attention, and decodes with its cache. It has no options.\n',
})

const backend = await firstAvailable([
  () => import('@moe/kernels-cuda'),
  () => import('@moe/kernels-cpu'),
  () => import('@moe/backend-tfjs'),
  () => import('@moe/core/reference'),
])
setDefaultBackend(backend)
console.log(`backend ${backend.name}`)

const config: MlaConfig = {
  hidden_size: 128,
  num_attention_heads: 8,
  q_lora_rank: 64,
  kv_lora_rank: 32,
  qk_nope_head_dim: 16,
  qk_rope_head_dim: 8,
  v_head_dim: 16,
}

/** A custom block: attention, multiplied by a gate that depends on the input. Field names are the checkpoint keys. */
class GatedBlock extends Module {
  norm: RmsNorm
  attention: MultiHeadLatentAttention
  gate: Linear

  constructor(init: InitOptions) {
    super()
    this.norm = new RmsNorm(config.hidden_size)
    this.attention = new MultiHeadLatentAttention(config, init)
    this.gate = new Linear(config.hidden_size, config.hidden_size, init)
  }

  forward(x: Tensor, options: MlaForwardOptions = {}): Tensor {
    const normal = this.norm.forward(x)
    return x.add(this.attention.forward(normal, options).mul(this.gate.forward(normal).sigmoid()))
  }
}

const random = new Random(1)
const block = new GatedBlock({ random, std: 0.1 })
const [batch, time] = [2, 24]
const x = randn([batch, time, config.hidden_size], random)

// Training: backward computes the gradients of all parameters.
scope(() => backward(block.forward(x).mean()))
const withGradient = trainable(block).filter(parameter => parameter.grad !== null)
console.log(`trained ${withGradient.length} of ${trainable(block).length} parameters have a gradient`)

// Cache size per token, compared with standard attention with the same heads.
const cache = new LatentCache(config, { layers: 1, batch })
const plainBytes =
  config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim) * 4
console.log(`cache   ${cache.bytesPerToken} bytes per token and layer; full keys and values would take ${plainBytes}`)

// Prefill the prompt, then decode token by token. Short pieces use the absorbed form, which computes directly on the latents.
const whole = await noGrad(() => scope(() => block.forward(x))).values()
let worst = 0
for (let start = 0; start < time; start = cache.lengths[0]) {
  const end = start === 0 ? 16 : start + 1
  const out = noGrad(() => scope(() => block.forward(x.narrow(1, start, end), { cache })))
  cache.advance(end - start)
  const piece = await out.values()
  out.dispose()
  const size = (end - start) * config.hidden_size
  for (let row = 0; row < batch; row++) {
    for (let i = 0; i < size; i++) {
      const expected = whole[(row * time + start) * config.hidden_size + i]
      worst = Math.max(worst, Math.abs(piece[row * size + i] - expected))
    }
  }
}
console.log(
  `decode  ${time - 16} tokens after a prompt of 16 differ from the full forward pass by at most ${worst.toExponential(1)}`,
)
console.log(worst < 1e-4 ? 'equal' : 'NOT EQUAL')
if (!(worst < 1e-4)) process.exitCode = 1
