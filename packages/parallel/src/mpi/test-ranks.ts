/** @file For tests only: a rank started by an MPI launcher. The argument says what to do. Reports once. */
import { isDeepStrictEqual } from 'node:util'
import { setDefaultBackend, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { exercise, expected } from '../communicator/test-exercise.ts'
import { split } from '../experts/test-layer.ts'
import { mpi } from '../index.ts'
import { pipelineSteps, spreadPairsStep, spreadStep } from '../test-steps.ts'
import { report } from './test-launch.ts'

const filled = (length: number, value: number) =>
  tensor(new Float32Array(length).fill(value), [length], { backend: referenceBackend() })

const ranks = await mpi()
switch (process.argv[2]) {
  case 'exercise': {
    const result = await exercise(ranks)
    const same = isDeepStrictEqual(
      JSON.parse(JSON.stringify(result)),
      JSON.parse(JSON.stringify(expected(ranks.rank, ranks.size))),
    )
    report({ rank: ranks.rank, size: ranks.size, same })
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
    report({ rank: ranks.rank, ...(await split(ranks)) })
    break
  }
  case 'spread': {
    setDefaultBackend(referenceBackend())
    report({ rank: ranks.rank, ...(await spreadStep(ranks)) })
    break
  }
  case 'pairs': {
    setDefaultBackend(referenceBackend())
    report({ rank: ranks.rank, ...(await spreadPairsStep(ranks)) })
    break
  }
  case 'wait': {
    // Rank 0 is late: the other one's timers run meanwhile.
    let turns = 0
    const timer = setInterval(() => turns++, 10)
    if (ranks.rank === 0) await new Promise(resolve => setTimeout(resolve, 500))
    await ranks.barrier()
    clearInterval(timer)
    report({ rank: ranks.rank, alive: turns >= 10 })
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
    if (ranks.rank === 1) throw new Error('rank 1 has had enough')
    await ranks.barrier()
    break
  }
}
await ranks.close()
