/**
 * Bandwidth of communication between ranks.
 *
 *     mpirun -np 2 node bench/ranks.ts [--nccl] [--mib 1,16,256] [--seconds 1] [--json FILE]
 *     pnpm bench ranks
 *
 * Shows bytes per second of sums, gathers and exchanges by size, over MPI or, with --nccl, between GPUs. Without a
 * launcher, it runs two ranks in one process, which take turns: this measures adding and copying, but not messages. The
 * bandwidth is that of a rank's link, as in nccl-tests: a sum over n ranks moves at least 2 (n-1)/n times its bytes, a
 * gather or exchange (n-1)/n times what a rank has in the end. Results are medians, for the slowest rank.
 */
import { parseArgs } from 'node:util'
import { type Backend, fromHost, type Tensor } from '@moe/core'
import { type Communicator, local, mpi, nccl } from '@moe/parallel'
import { median, printTable, writeResults } from './shared/report.ts'

const { values: options } = parseArgs({
  options: {
    nccl: { type: 'boolean', default: false },
    mib: { type: 'string', default: '1,16,256' },
    seconds: { type: 'string', default: '1' },
    json: { type: 'string' },
  },
})
const isLaunched = ['OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'SLURM_NTASKS'].some(name => name in process.env)

async function backendOf(rank: number): Promise<Backend> {
  if (options.nccl) return (await import('@moe/kernels-cuda')).createBackend({ device: rank })
  return (await import('@moe/kernels-cpu')).createBackend({ threads: isLaunched ? 1 : undefined })
}

interface Measurement {
  readonly name: string
  readonly mib: number
  readonly milliseconds: number
  /** Bytes per second. */
  readonly bandwidth: number
}

async function measure(ranks: Communicator, backend: Backend): Promise<Measurement[]> {
  const { size } = ranks
  const even = (rows: number) => Array.from({ length: size }, () => rows / size)
  const results: Measurement[] = []
  for (const mib of options.mib.split(',').map(Number)) {
    const length = Math.ceil((mib * 2 ** 20) / 4 / size) * size
    const whole = fromHost(new Float32Array(length).fill(1), [length], 'f32', backend)
    const share = fromHost(new Float32Array(length / size), [length / size], 'f32', backend)
    const calls: ReadonlyArray<readonly [name: string, moved: number, call: () => Promise<readonly Tensor[]>]> = [
      ['allReduce', (2 * (size - 1)) / size, () => ranks.allReduce([whole])],
      ['allGather', (size - 1) / size, async () => [await ranks.allGather(share)]],
      ['allToAll', (size - 1) / size, async () => [(await ranks.allToAll(whole, even(length), even(length))).rows]],
    ]
    for (const [name, moved, call] of calls) {
      const milliseconds = await slowest(ranks, backend, await timeOf(ranks, backend, call))
      results.push({ name, mib, milliseconds, bandwidth: (moved * 4 * length) / (milliseconds / 1000) })
    }
    whole.dispose()
    share.dispose()
  }
  return results
}

/** Milliseconds of a call, measured after all ranks have reached it. */
async function timeOf(ranks: Communicator, backend: Backend, call: () => Promise<readonly Tensor[]>): Promise<number> {
  const once = async () => {
    await ranks.barrier()
    const before = performance.now()
    const made = await call()
    await backend.sync?.()
    const milliseconds = performance.now() - before
    for (const tensor of made) tensor.dispose()
    return milliseconds
  }
  await once()
  // The same number on every rank.
  const rounds = (1000 * Number(options.seconds)) / (await slowest(ranks, backend, await once()))
  const times: number[] = []
  for (let i = 0; i < Math.max(5, Math.min(50, rounds)); i++) times.push(await once())
  return median(times)
}

async function slowest(ranks: Communicator, backend: Backend, milliseconds: number): Promise<number> {
  const own = fromHost(Float32Array.of(milliseconds), [1], 'f32', backend)
  const [all] = await ranks.allReduce([own], 'max')
  const result = await all.item()
  for (const tensor of [own, all]) tensor.dispose()
  return result
}

async function run(host: Communicator): Promise<void> {
  const backend = await backendOf(host.rank)
  const ranks = options.nccl ? await nccl(host, { backend }) : host
  const results = await measure(ranks, backend)
  if (ranks.rank === 0) {
    const over = options.nccl ? 'NCCL' : isLaunched ? 'MPI' : 'one process'
    console.log(`${ranks.size} ranks over ${over}, ${backend.device ?? backend.name}`)
    printTable(
      ['call', 'MiB', 'ms', 'GB/s'],
      results.map(({ name, mib, milliseconds, bandwidth }) => [
        name,
        String(mib),
        milliseconds.toFixed(2),
        (bandwidth / 1e9).toFixed(2),
      ]),
    )
    writeResults(options.json, { ranks: ranks.size, over, device: backend.device, results })
  }
  await ranks.close()
  backend.dispose?.()
}

if (isLaunched) await run(await mpi())
else await local(2, run)
