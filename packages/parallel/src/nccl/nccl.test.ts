/** @file The NCCL communicator, compared with the host communicator, on emulated devices, or with MOE_REQUIRE_CUDA=1 on real ones. The emulated NCCL also detects invalid use: see emulator/nccl.cc of `@moe/kernels-cuda`. */
import { fileURLToPath } from 'node:url'
import { type Backend, deferWeights, fromHost, isMoeError, type MoeError, Random, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { DeepSeek } from '@moe/deepseek'
import type { CudaBackend } from '@moe/kernels-cuda'
import koffi from 'koffi'
import { afterEach, describe, expect, test, vi } from 'vitest'
import type { Communicator } from '../communicator/communicator.ts'
import { exercise, expected } from '../communicator/test-exercise.ts'
import { ExpertParallel, local } from '../index.ts'
import { localDevice, overDevices } from '../lead-processes.ts'
import { launch, launchers } from '../mpi/test-launch.ts'
import { digestOf, parallelisms, smallConfig, trainSmall } from '../test-training.ts'
import type { CudaAccess } from './device-memory.ts'
import { nccl } from './nccl.ts'
import { backendOf, connect, driver, library, mostRanks, onDevice, onDevices, unavailable } from './test-devices.ts'

const script = fileURLToPath(new URL('./test-devices.ts', import.meta.url))

async function failure(action: Promise<unknown>): Promise<MoeError> {
  const error = await action.then(
    () => new Error('no error'),
    reason => reason,
  )
  expect(isMoeError(error), String(error)).toBe(true)
  return error as MoeError
}

/** Numbers of ranks for which there are enough devices. */
const sizes = [1, 2, 3, 4].filter(size => size <= mostRanks)
const onTwoDevices = test.skipIf(mostRanks < 2)
/** For tests that make calls fail on purpose. */
const onEmulator = test.skipIf(onDevice)

describe.skipIf(unavailable)('NCCL', () => {
  /** The number of emulated communicators that are not destroyed. */
  const openCommunicators = () =>
    onDevice ? 0 : (koffi.load(library).func('int moe_nccl_living()') as unknown as () => number)()
  const fail = (call: string, after: number, status: number) =>
    koffi.load(driver).func('void moe_emulator_fail(const char* call, int after, int status)')(call, after, status)
  const reset = () => {
    if (onDevice) return
    koffi.load(driver).func('void moe_emulator_reset()')()
    koffi.load(library).func('void moe_nccl_reset()')()
  }
  afterEach(reset)

  test.each(sizes)(
    'all collectives between %i ranks give the expected results, and leave no communicator open',
    async size => {
      const results = await onDevices(size, async (ranks, backend) => {
        const before = backend.stats()
        const result = await exercise(ranks, backend)
        // `exercise` disposes of none of its tensors.
        expect(backend.stats().handles).toBeGreaterThan(before.handles)
        return result
      })
      for (const [rank, result] of results.entries()) expect(result).toEqual(expected(rank, size))
      expect(openCommunicators()).toBe(0)
    },
  )

  // Reason to skip: no MPI is installed here.
  test.skipIf(launchers().length === 0 || mostRanks < 3)(
    'all collectives between three processes give the expected results',
    async () => {
      const { code, reports, errors } = await launch(launchers()[0], 3, [script])
      expect(errors).toBe('')
      expect(reports.map(({ rank, size, same }) => ({ rank, size, same }))).toEqual(
        [0, 1, 2].map(rank => ({ rank, size: 3, same: true })),
      )
      expect(code).toBe(0)
    },
  )

  onTwoDevices(
    'reductions of numbers of all magnitudes, infinities, NaN and both zeros give the same bits as with the host communicator',
    async () => {
      const size = Math.min(3, mostRanks)
      const special = [0, -0, Number.NaN, Infinity, -Infinity, 3e38, -3e38, 1e-45, 2 ** 24 + 1]
      const inputs = (rank: number, backend: Backend) => {
        const random = new Random(5).fork(`${rank}`)
        const wide = Float32Array.from({ length: 3000 }, () =>
          random.integer(5) === 0
            ? special[random.integer(special.length)]
            : random.normal(1)[0] * 2 ** random.integer(60),
        )
        const whole = Int32Array.from({ length: 500 }, () => random.integer(2 ** 32) - 2 ** 31)
        return [
          tensor(wide, [wide.length], { backend }),
          tensor(wide, [wide.length], { backend, dtype: 'bf16' }),
          fromHost(whole, [whole.length], 'i32', backend),
        ]
      }
      const all = async (ranks: Communicator, backend: Backend) => {
        const [f32, bf16, i32] = inputs(ranks.rank, backend)
        const sums = [
          ...(await ranks.allReduce([f32, bf16, i32])),
          ...(await ranks.allReduce([f32, bf16, i32], 'max')),
          ...(await ranks.allReduce([f32, bf16], 'mean')),
        ]
        // As numbers, so that the sign and payload of NaN do not count.
        return Promise.all(sums.map(async sum => Array.from(await sum.values())))
      }
      const found = await onDevices(size, all)
      const onHosts = await local(size, ranks => all(ranks, referenceBackend()))
      expect(found).toEqual(onHosts)
    },
  )

  onTwoDevices.each(['data', 'pipeline', 'expert'] as const)(
    'training with %s parallelism gives the same weights as with the host communicator',
    async kind => {
      const { accumulate, onRanks } = parallelisms[kind]
      const trained = async (ranks: Communicator, backend: CudaBackend) => {
        const result = await trainSmall(backend, { accumulate, steps: 2 }, { onRanks: model => onRanks(model, ranks) })
        return { digest: digestOf(result), losses: result.steps.map(({ loss }) => loss) }
      }
      const found = await onDevices(2, trained, { guarded: false })
      reset()
      const onHosts = await local(2, async ranks => trained(ranks, await backendOf(ranks.rank, false)))
      expect(found).toEqual(onHosts)
    },
  )

  onTwoDevices(
    'recorded steps give the same bits as steps op by op with the host communicator',
    async () => {
      const options = { steps: 4, accumulate: 2 }
      const trained = async (backend: CudaBackend, ranks: Communicator, record: boolean) => {
        const before = backend.stats().launches
        const { steps, weights } = await trainSmall(backend, { ...options, record, ranks })
        return { steps, weights, launches: backend.stats().launches - before }
      }
      const found = await onDevices(2, (ranks, backend) => trained(backend, ranks, true), { guarded: false })
      reset()
      const onHosts = await local(2, async ranks => trained(await backendOf(ranks.rank, false), ranks, false))
      for (const [rank, { launches, ...numbers }] of found.entries()) {
        const { launches: opByOp, ...expected } = onHosts[rank]
        expect(numbers).toEqual(expected)
        expect(launches).toBeLessThan(0.8 * opByOp)
      }
      // Takes sixteen seconds on an idle machine.
    },
    240_000,
  )

  onTwoDevices.each([undefined, 'int4'] as const)(
    'a rank generates with the experts of both devices, weights %s, as with the whole model',
    async weights => {
      const texts = async (model: DeepSeek) => {
        const batch = model.continuousBatch({ speculative: true })
        const read = async (prompt: number[]) => {
          const ids: number[] = []
          for await (const id of batch.generate(prompt, { maxTokens: 6 })) ids.push(id)
          return ids
        }
        const made = await Promise.all([[3, 7, 11], [5]].map(read))
        batch.dispose()
        return made
      }
      const newModel = (backend: Backend) => new DeepSeek(smallConfig, { seed: 1, backend, weights })
      const [found, other] = await onDevices(2, async (ranks, backend) => {
        const model = deferWeights(() => newModel(backend))
        const parallel = new ExpertParallel(model, ranks)
        const made = await parallel.lead(() => texts(model))
        parallel.dispose()
        model.dispose()
        expect(backend.stats().handles).toBe(0)
        return made
      })
      reset()
      const backend = await backendOf(0, false)
      const whole = newModel(backend)
      expect([found, other]).toEqual([await texts(whole), undefined])
      whole.dispose()
      backend.dispose()
    },
  )

  onTwoDevices('a pending message blocks neither the event loop nor the backend', async () => {
    const results = await onDevices(2, async (ranks, backend) => {
      const ones = tensor([1, 1], [2], { backend })
      const other = 1 - ranks.rank
      const coming = ranks.receive({ shape: [2], dtype: 'f32' }, other)
      // Both wait for the other's message, and compute their own meanwhile.
      let sum = ones
      for (let i = 0; i < 3; i++) {
        await new Promise(resolve => setTimeout(resolve, 5))
        sum = sum.add(ones)
        expect(await sum.values()).toEqual(Float32Array.of(i + 2, i + 2))
      }
      await ranks.send(sum.mul(ranks.rank + 1), other)
      return [...(await (await coming).values())]
    })
    expect(results).toEqual([
      [8, 8],
      [4, 4],
    ])
  })

  onTwoDevices('messages between two ranks arrive in the order of sending, also if sent concurrently', async () => {
    const results = await onDevices(2, async (ranks, backend) => {
      const of = (i: number) => tensor([i], [1], { backend })
      if (ranks.rank === 0) {
        await Promise.all([1, 2, 3, 4].map(i => ranks.send(of(i), 1)))
        return []
      }
      const received = await Promise.all([1, 2, 3, 4].map(() => ranks.receive({ shape: [1], dtype: 'f32' }, 0)))
      return Promise.all(received.map(one => one.item()))
    })
    expect(results[1]).toEqual([1, 2, 3, 4])
  })

  onEmulator('ranks that make different calls get an error', async () => {
    const error = await failure(
      onDevices(2, async (ranks, backend) => {
        await ranks.allGather(tensor(new Float32Array(ranks.rank + 1), [ranks.rank + 1], { backend }))
      }),
    )
    expect(error.message).toMatch(/nccl: rank \d sends \d bytes where rank \d takes \d/)
  })

  onEmulator.each(['ncclGetUniqueId', 'ncclCommInitRankConfig', 'ncclCommGetAsyncError'])(
    'if %s fails, ranks are not connected and get the reason',
    async call => {
      const before = openCommunicators()
      fail(call, 1, 5)
      const { code, message } = await failure(onDevices(1, async () => {}))
      expect(openCommunicators()).toBe(before)
      expect(code).toBe('E_BACKEND')
      expect(message).toMatch(
        /nccl begin: invalid usage .*check that each rank has its own device, and set NCCL_DEBUG=WARN/,
      )
    },
  )

  onEmulator.each(['ncclGroupStart', 'ncclSend', 'ncclGroupEnd', 'ncclCommGetAsyncError'])(
    'if %s fails, messages in progress are aborted, and later calls fail with E_ABORTED',
    async call => {
      const before = openCommunicators()
      await local(2, async host => {
        const backend = await backendOf(host.rank)
        const ranks = await connect(host, backend)
        if (ranks.rank === 0) {
          const one = tensor([1], [1], { backend })
          fail(call, 1, 6)
          const { code, message } = await failure(ranks.allReduce([one]))
          expect(`${code} ${message}`).toMatch(/^E_BACKEND nccl messages: unknown result code/)
          expect((await failure(ranks.allReduce([one]))).code).toBe('E_ABORTED')
          one.dispose()
          expect(backend.stats().handles).toBe(0)
        } else await ranks.close()
        backend.dispose()
      })
      expect(openCommunicators()).toBe(before)
    },
  )

  test('a tensor of another backend, or a disposed one, is an error', async () => {
    await onDevices(1, async (ranks, backend) => {
      const foreign = tensor([1], [1], { backend: referenceBackend() })
      expect((await failure(ranks.allReduce([foreign]))).message).toMatch(
        /a tensor on reference.* create it on the backend/,
      )
      const freed = tensor([1], [1], { backend })
      freed.dispose()
      expect((await failure(ranks.allReduce([freed]))).code).toBe('E_DISPOSED')
    })
  })

  test('a missing library, a backend that is not CUDA, an NCCL communicator as host and a closed communicator are errors', async () => {
    await local(1, async host => {
      const backend = await backendOf(0)
      const without = await failure(nccl(host, { backend, library: '/nowhere/libnccl.so' }))
      expect(`${without.code} ${without.message}`).toMatch(
        /^E_NO_BACKEND nccl: no NCCL found \(.*nowhere.*\); install NVIDIA's libnccl2/,
      )
      const other = await failure(nccl(host, { backend: referenceBackend(), library }))
      expect(`${other.code} ${other.message}`).toMatch(/^E_CONFIG nccl: reference.* is not a CUDA backend/)
      const ranks = await connect(host, backend)
      const again = await failure(nccl(ranks, { backend, library }))
      expect(`${again.code} ${again.message}`).toMatch(
        /^E_CONFIG nccl: ranks is not a communicator of mpi\(\) or local\(\)/,
      )
      await ranks.close()
      const late = await failure(ranks.allReduce([tensor([1], [1], { backend })]).then(() => ranks.barrier()))
      expect(late.code).toBe('E_ABORTED')
      backend.dispose()
    })
  })

  onEmulator('without NCCL on every rank, a command sends tensors through host memory, and says why', async () => {
    const found = async (file: string, backendsOf: (rank: number) => Promise<Backend> | Backend) => {
      vi.stubEnv('MOE_NCCL_LIBRARY', file)
      const notes: string[] = []
      const sums = await local(2, async host => {
        const backend = await backendsOf(host.rank)
        const ranks = await overDevices(host, backend, text => notes.push(`${host.rank} ${text}`))
        const one = tensor([1], [1], { backend })
        const [sum] = await ranks.allReduce([one])
        const result = [await sum.item(), ranks === host]
        for (const each of [one, sum]) each.dispose()
        await ranks.close()
        if ('interop' in backend) (backend as CudaBackend).dispose()
        return result
      })
      vi.unstubAllEnvs()
      return { sums, notes }
    }
    const twice = <T>(value: T) => [value, value]
    expect(await found(library, backendOf)).toEqual({ sums: twice([2, false]), notes: [] })
    expect(await found('/nowhere/libnccl.so', backendOf)).toEqual({
      sums: twice([2, true]),
      notes: [expect.stringMatching(/^0 note: tensors are sent through host memory, which is slower: nccl: no NCCL/)],
    })
    expect(await found(library, rank => (rank === 0 ? backendOf(0) : referenceBackend()))).toEqual({
      sums: twice([2, true]),
      notes: [expect.stringMatching(/^1 note: .*: rank 1 runs on reference$/)],
    })
    expect(await found(library, () => referenceBackend())).toEqual({ sums: twice([2, true]), notes: [] })
  })

  test('the interop of @moe/kernels-cuda implements CudaAccess', async () => {
    const backend = await backendOf(0)
    const access: CudaAccess = backend.interop
    expect(access).toBe(backend.interop)
    backend.dispose()
  })
})

test('the GPU of a process is numbered by its launcher, among those that the process may use', () => {
  expect(localDevice({})).toBe(undefined)
  expect(localDevice({ OMPI_COMM_WORLD_LOCAL_RANK: '3' })).toBe(3)
  expect(localDevice({ MPI_LOCALRANKID: '2', CUDA_VISIBLE_DEVICES: '4,5,6,7' })).toBe(2)
  expect(localDevice({ SLURM_LOCALID: '3', CUDA_VISIBLE_DEVICES: '6' })).toBe(0)
})
