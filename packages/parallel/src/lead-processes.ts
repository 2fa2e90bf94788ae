/** @file Commands that run on several processes, such as `moe-serve --ranks`: the first process leads, the others compute experts for it. */
import { type Backend, fromHost, type LocalParameter } from '@moe/core'
import type { Communicator } from './communicator/communicator.ts'
import { ExpertParallel, type ExpertParallelModel } from './experts/expert-parallel.ts'
import { mpi } from './mpi/mpi.ts'
import { openNccl } from './nccl/library.ts'
import { nccl } from './nccl/nccl.ts'

/** What a command does with a model. */
export interface LedCommand<Opened> {
  /** Creates the default backend. @param device the index of this process's GPU, if its launcher numbers the processes of a machine */
  createBackend(device: number | undefined): Promise<Backend>
  /** Opens the model with some of its weights. */
  open(parameters: (model: ExpertParallelModel<never>) => readonly LocalParameter[]): Promise<Opened>
  /** Uses the model, on the first process. @param processes their number */
  work(opened: Opened, processes: number): Promise<void>
  /** Shows a note to the user. */
  note(text: string): void
}

/**
 * Runs a command on the processes that `mpirun` or `mpiexec` has started. They share the experts of the model, and the first one leads (`ExpertParallel.lead`). Tensors on GPUs
 * are sent by NCCL, or, if a process has none, through host memory. An error of `work` is thrown on the first process; the others end as after success. After any other error,
 * the process must exit.
 * @internal
 */
export async function leadProcesses<Opened extends { readonly model: ExpertParallelModel<never> }>({
  createBackend,
  open,
  work,
  note,
}: LedCommand<Opened>): Promise<void> {
  const processes = await mpi()
  const ranks = await overDevices(processes, await createBackend(localDevice(process.env)), note)
  let opened!: Opened
  const { spread } = await ExpertParallel.open(async parameters => {
    opened = await open(parameters)
    return opened.model
  }, ranks)
  // The first process ends the others. When interrupted, the launcher also signals them.
  if (ranks.rank > 0) for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => undefined)
  const failed = await spread.lead(() =>
    work(opened, ranks.size).then(
      () => null,
      (error: unknown) => ({ error }),
    ),
  )
  await ranks.close()
  if (failed) throw failed.error
}

/** Internal. Connects the same ranks by NCCL, if their backends are on GPUs and all of them have NCCL. */
export async function overDevices(
  ranks: Communicator,
  backend: Backend,
  note: (text: string) => void,
): Promise<Communicator> {
  const isOnDevice = 'interop' in backend
  const missing = isOnDevice
    ? await openNccl().then(
        () => null,
        (error: Error) => error.message,
      )
    : `rank ${ranks.rank} runs on ${backend.name}`
  const own = fromHost(Int32Array.of(Number(isOnDevice), Number(missing === null)), [1, 2], 'i32', backend)
  const all = await ranks.allGather(own).finally(() => own.dispose())
  const values = Array.from(await all.values())
  all.dispose()
  const onDevice = values.filter((_, i) => i % 2 === 0)
  const hasNccl = values.filter((_, i) => i % 2 === 1)
  if (!hasNccl.includes(0)) return nccl(ranks, { backend })
  if (onDevice.includes(1) && hasNccl.indexOf(0) === ranks.rank)
    note(`note: tensors are sent through host memory, which is slower: ${missing}`)
  return ranks
}

/** Internal. The index of this process's GPU: each process of a machine has its own. Undefined if the launcher does not number them. */
export function localDevice(environment: NodeJS.ProcessEnv): number | undefined {
  const names = ['OMPI_COMM_WORLD_LOCAL_RANK', 'MPI_LOCALRANKID', 'SLURM_LOCALID']
  const rank = names.map(name => environment[name]).find(value => value !== undefined)
  if (rank === undefined) return undefined
  // Schedulers may show each process only its own GPU, which is then number 0.
  const visible = environment['CUDA_VISIBLE_DEVICES']?.split(',').length ?? Number.POSITIVE_INFINITY
  return Number(rank) % visible
}
