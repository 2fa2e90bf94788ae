import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'
import { setDefaultBackend } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { describe, expect, test } from 'vitest'
import { shardedPass } from '../experts/test-layer.ts'
import { local, mpi } from '../index.ts'
import { expertParallelPipelineStep, expertParallelStep, pipelineSteps } from '../test-steps.ts'
import { launch, launchers } from './test-launch.ts'

const script = fileURLToPath(new URL('./test-ranks.ts', import.meta.url))
const installed = launchers()

test('a missing library is an error that lists the paths tried and the possible fixes', async () => {
  await expect(mpi({ library: '/nowhere/libmpi.so' })).rejects.toThrow(
    /mpi: no MPI library found \(.*nowhere.*\); install Open MPI or MPICH, or set MOE_MPI_LIBRARY to .*; without MPI, local/,
  )
})

// Reason to skip: no MPI is installed here (Debian: apt-get install openmpi-bin, or mpich).
describe.skipIf(installed.length === 0)('MPI', () => {
  describe.each(installed)('$name', launcher => {
    test.each([1, 2, 3])(
      'all collectives between %i processes give the same bits as the local communicator',
      async size => {
        const { code, reports, errors } = await launch(launcher, size, [script, 'exercise'])
        expect(errors).toBe('')
        expect(reports).toEqual(Array.from({ length: size }, (_, rank) => ({ rank, size, same: true, threads: 1 })))
        expect(code).toBe(0)
      },
    )

    test.each([
      ['a pipeline', 2, 'pipeline', pipelineSteps],
      ['a layer with sharded experts', 2, 'experts', shardedPass],
      ['expert parallelism', 2, 'expert-parallel', expertParallelStep],
      ['a pipeline with expert parallelism', 4, 'expert-parallel-pipeline', expertParallelPipelineStep],
    ] as const)(
      '%s on %i processes gives the same bits as with the local communicator',
      async (_, size, scenario, work) => {
        setDefaultBackend(referenceBackend())
        const found = await local<Awaited<ReturnType<typeof work>> & { rank: number }>(size, async ranks => ({
          rank: ranks.rank,
          ...(await work(ranks)),
        }))
        const expected = found.map(({ rank, ...rest }) => ({ rank, ...JSON.parse(JSON.stringify(rest)) }))
        const { code, reports, errors } = await launch(launcher, size, [script, scenario])
        expect(errors).toBe('')
        expect(reports).toEqual(expected)
        expect(code).toBe(0)
      },
    )

    test('a rank that waits for another does not block its event loop', async () => {
      const { reports } = await launch(launcher, 2, [script, 'wait'])
      expect(reports).toEqual([0, 1].map(rank => ({ rank, timersRan: true })))
    })

    test('ranks that make different calls get an error, and MPI does not abort', async () => {
      const { reports } = await launch(launcher, 2, [script, 'differ'])
      expect(reports.map(({ error }) => error)).toEqual([
        expect.stringMatching(/^E_SHAPE receive: received 8000 bytes from rank 1, expected 4000;/),
        expect.stringMatching(/^E_SHAPE receive: received 4000 bytes from rank 0, expected 8000;/),
      ])
    })

    test('a failed rank ends all ranks', async () => {
      const { code, errors } = await launch(launcher, 2, [script, 'fail'])
      expect(code).not.toBe(0)
      expect(errors).toMatch(/rank 1 failed on purpose/)
    })
  })

  test.skipIf(installed.length < 2 /* needs two MPI implementations */)(
    'a library of another MPI implementation than the launcher is an error',
    async () => {
      const other = { 'Open MPI': 'libmpich.so.12', MPICH: 'libmpi.so.40' }
      for (const launcher of installed) {
        const library = other[launcher.name as keyof typeof other]
        const { code, errors } = await launch(launcher, 2, [script, 'exercise'], { MOE_MPI_LIBRARY: library })
        expect(code).not.toBe(0)
        expect(errors).toMatch(/the launcher started 2 processes, but .* finds only this one/)
      }
    },
  )

  test('a process without a launcher is the only rank', () => {
    const { stdout } = spawnSync(process.execPath, [script, 'exercise'], { encoding: 'utf8' })
    expect(JSON.parse(stdout)).toEqual({ rank: 0, size: 1, same: true, threads: 1 })
  })

  test('a process that srun started without support for MPI does not believe to be the only rank', () => {
    const env = { ...process.env, SLURM_STEP_NUM_TASKS: '4' }
    const { status, stderr } = spawnSync(process.execPath, [script, 'exercise'], { encoding: 'utf8', env })
    expect(status).not.toBe(0)
    expect(stderr).toMatch(/mpi: srun started 4 processes, but .* finds only this one; pass srun an --mpi/)
  })
})
