/** @file For tests only: a rank started by an MPI launcher. The argument says what to do. Reports once. */
import { isDeepStrictEqual } from 'node:util'
import { setDefaultBackend, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import koffi from 'koffi'
import { exercise, expected } from '../communicator/test-exercise.ts'
import { shardedPass } from '../experts/test-layer.ts'
import { mpi } from '../index.ts'
import { expertParallelPipelineStep, expertParallelStep, pipelineSteps } from '../test-steps.ts'
import { openMpi } from './library.ts'
import { report } from './test-launch.ts'

const filled = (length: number, value: number) =>
  tensor(new Float32Array(length).fill(value), [length], { backend: referenceBackend() })

/** 1 is MPI_THREAD_FUNNELED, which the standard requires of a process with several threads. */
async function threadLevel(): Promise<number> {
  const { path } = await openMpi()
  const level = new Int32Array(1)
  koffi.load(path).func('int MPI_Query_thread(void* level)')(level)
  return level[0]
}

const ranks = await mpi()
switch (process.argv[2]) {
  case 'exercise': {
    const result = await exercise(ranks)
    const same = isDeepStrictEqual(
      JSON.parse(JSON.stringify(result)),
      JSON.parse(JSON.stringify(expected(ranks.rank, ranks.size))),
    )
    report({ rank: ranks.rank, size: ranks.size, same, threads: await threadLevel() })
    break
  }
  case 'pipeline': {
    setDefaultBackend(referenceBackend())
    const { loss, gradients } = await pipelineSteps(ranks)
    report({ rank: ranks.rank, loss, gradients })
    break
  }
  case 'experts': {
    setDefaultBackend(referenceBackend())
    report({ rank: ranks.rank, ...(await shardedPass(ranks)) })
    break
  }
  case 'expert-parallel': {
    setDefaultBackend(referenceBackend())
    report({ rank: ranks.rank, ...(await expertParallelStep(ranks)) })
    break
  }
  case 'expert-parallel-pipeline': {
    setDefaultBackend(referenceBackend())
    report({ rank: ranks.rank, ...(await expertParallelPipelineStep(ranks)) })
    break
  }
  case 'wait': {
    // Rank 0 arrives late. Timers of the other rank must run while it waits.
    let ticks = 0
    const timer = setInterval(() => ticks++, 10)
    if (ranks.rank === 0) await new Promise(resolve => setTimeout(resolve, 500))
    await ranks.barrier()
    clearInterval(timer)
    report({ rank: ranks.rank, timersRan: ticks >= 10 })
    break
  }
  case 'differ': {
    const error = await ranks.allGather(filled(ranks.rank === 0 ? 1000 : 2000, 1)).then(
      () => null,
      ({ code, message }) => `${code} ${message}`,
    )
    report({ rank: ranks.rank, error })
    // The launcher ends all ranks when the first one exits like this: wait until both have reported.
    const reported = ranks.receive(filled(1, 1), 1 - ranks.rank)
    await ranks.send(filled(1, 1), 1 - ranks.rank)
    await reported
    process.exit(1)
    break
  }
  case 'fail': {
    if (ranks.rank === 1) throw new Error('rank 1 failed on purpose')
    await ranks.barrier()
    break
  }
}
await ranks.close()
