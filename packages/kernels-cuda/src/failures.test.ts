/** @file GPU failures: each gives a clear error, the process survives, and the last checkpoint is intact. */
import { spawnSync } from 'node:child_process'
import { cpSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  firstAvailable,
  full,
  isMoeError,
  type MoeError,
  Random,
  setDefaultBackend,
  type Tensor,
  tensor,
} from '@moe/core'
import { DeepSeek, type GenerateOptions, presets } from '@moe/deepseek'
import { TokenDataset, train } from '@moe/trainer'
import { afterAll, afterEach, beforeEach, describe, expect, test } from 'vitest'
import { createBackend } from './backend.ts'
import { type CudaOptions, openCuda } from './open.ts'
import { emulator, emulatorFunction, onDevice, resetEmulator, unavailable } from './test-backend.ts'

// Read when the emulator starts, so it applies to all tests of this file.
process.env['MOE_EMULATOR_MEMORY'] = String(2 ** 26)

const folder = mkdtempSync(join(tmpdir(), 'moe-cuda-'))
afterAll(() => rmSync(folder, { recursive: true }))

async function failure(options: CudaOptions): Promise<MoeError> {
  try {
    const backend = await createBackend(options)
    backend.dispose()
  } catch (error) {
    return error as MoeError
  }
  throw new Error('it worked')
}

describe('without a driver', () => {
  test('createBackend reports what was tried, and firstAvailable tries the next backend', async () => {
    const error = await failure({ driver: join(folder, 'libcuda.so.1') })
    expect(isMoeError(error, 'E_NO_BACKEND')).toBe(true)
    expect(error.message).toMatch(/found no NVIDIA driver \(.*libcuda\.so\.1.*install the NVIDIA driver/s)
    const reasons: string[] = []
    const cuda = { createBackend: () => createBackend({ driver: join(folder, 'libcuda.so.1') }) }
    const loaders = [async () => cuda, () => import('@moe/core/reference')]
    expect((await firstAvailable(loaders, { onSkip: reason => reasons.push(reason) })).name).toBe('reference')
    expect(reasons[0]).toMatch(/NVIDIA driver/)
  })
})

describe.skipIf(unavailable || onDevice)('on the emulator', () => {
  const fail = (call: string, after: number, status: number) =>
    emulatorFunction('void moe_emulator_fail(const char* call, int after, int status)')(call, after, status)
  const open = () => {
    resetEmulator()
    return createBackend(emulator)
  }
  afterEach(resetEmulator)

  test.each([
    ['cuInit', 100, /found no device.*nvidia-smi/],
    ['cuInit', 999, /failed to initialize: CUDA_ERROR_UNKNOWN/],
    ['cuInit', 802, /failed to initialize.*802.*fabric manager/],
    ['cuDevicePrimaryCtxRetain', 46, /CUDA_ERROR_DEVICE_UNAVAILABLE.*nvidia-smi/],
  ])('createBackend reports %s returning %i', async (call, status, message) => {
    resetEmulator()
    fail(call, 1, status)
    const error = await failure(emulator)
    expect(isMoeError(error, 'E_NO_BACKEND')).toBe(true)
    expect(error.message).toMatch(message)
  })

  test.each([
    ['{ "cuda": "15.1" }', /driver supports CUDA 13\.0, but the kernels need a driver for CUDA 15\.0 or later; update/],
    ['{ "cuda": "13.2", "driver": "13.1" }', /the kernels need a driver for CUDA 13\.1 or later; update/],
    ['{ "driver": "newest" }', /cannot read .*manifest\.json \(it contains no CUDA version\)/],
    ['{}', /cannot read .*manifest\.json \(it contains no CUDA version\)/],
  ])('a driver that is too old, or an invalid manifest, is reported: %s', async (manifest, message) => {
    const kernels = join(folder, 'newer')
    cpSync(emulator.kernels, kernels, { recursive: true, filter: source => !source.endsWith('obj') })
    writeFileSync(join(kernels, 'manifest.json'), manifest)
    const error = await failure({ ...emulator, kernels })
    expect(error).toMatchObject({ code: 'E_NO_BACKEND' })
    expect(error.message).toMatch(message)
  })

  test('a driver of the same major version as newer kernels is enough', async () => {
    const kernels = join(folder, 'minor')
    cpSync(emulator.kernels, kernels, { recursive: true, filter: source => !source.endsWith('obj') })
    writeFileSync(join(kernels, 'manifest.json'), '{ "cuda": "13.9" }')
    const backend = await createBackend({ ...emulator, kernels })
    expect(backend.name).toBe('kernels-cuda')
    backend.dispose()
  })

  test('kernels for other devices, corrupt kernels and missing kernels are errors', async () => {
    const kernels = join(folder, 'foreign')
    cpSync(emulator.kernels, kernels, { recursive: true, filter: source => !source.endsWith('obj') })
    writeFileSync(join(kernels, 'fill.fatbin'), 'something else')
    const error = await failure({ ...emulator, kernels })
    expect(error).toMatchObject({ code: 'E_NO_BACKEND' })
    expect(error.message).toMatch(/fill\.fatbin.*emulated device.*sm|fill\.fatbin.*compute capability|INVALID_IMAGE/)
    const none = await failure({ ...emulator, kernels: join(folder, 'nothing') })
    expect(none).toMatchObject({ code: 'E_NO_BACKEND' })
    expect(none.message).toMatch(/nothing.*manifest\.json.*build-fatbins/s)
  })

  test('if createBackend fails, it keeps no context', async () => {
    const { cublasLt, kernels } = { cublasLt: join(folder, 'libcublasLt.so'), kernels: join(folder, 'nothing') }
    for (const option of [{ cublasLt }, { kernels }]) {
      resetEmulator()
      await failure({ ...emulator, ...option })
      const invalidContext = 201
      expect(emulatorFunction('int cuDevicePrimaryCtxRelease_v2(int device)')(0)).toBe(invalidContext)
    }
  })

  test('a device that is too old is an error', () => {
    const program = `
      import { createBackend } from ${JSON.stringify(join(import.meta.dirname, 'index.ts'))}
      await createBackend(${JSON.stringify(emulator)}).catch(error => console.log(error.code, error.message))`
    const env = { ...process.env, MOE_EMULATOR_CAPABILITY: '75' }
    const { stdout } = spawnSync(process.execPath, ['--input-type=module', '-e', program], { env, encoding: 'utf8' })
    expect(stdout).toMatch(/E_NO_BACKEND .*compute capability 7\.5, but 8\.0 \(Ampere\) or newer is required/)
  })

  test.each<CudaOptions>([
    { device: 7 },
    { device: 1 },
    { device: -1 },
    { device: 0.5 },
    { memoryLimit: Number.NaN },
    { memoryLimit: -1 },
  ])('invalid options are errors: %o', async options => {
    expect(await failure({ ...emulator, ...options })).toMatchObject({ code: 'E_CONFIG' })
  })

  test('out of memory: the error lists the ops that use memory, and the backend stays usable', async () => {
    const backend = await open()
    const held: Tensor[] = []
    let error: unknown
    try {
      for (let i = 0; i < 8; i++) held.push(full([2 ** 22], 1, { backend }))
    } catch (caught) {
      error = caught
    }
    expect(isMoeError(error, 'E_OUT_OF_MEMORY')).toBe(true)
    expect((error as MoeError).message).toMatch(
      /^fill: cannot allocate 16\.0 MiB: \d tensors already use \d+\.0 MiB \(allocated by: fill/,
    )
    for (const one of held) one.dispose()
    // Freed memory is cached in pieces of 16 MiB; a larger allocation requires that they are released first.
    const large = full([2 ** 23], 3, { backend })
    expect([...(await large.slice([0], [2]).values())]).toEqual([3, 3])
    backend.dispose()
    const limited = await createBackend({ ...emulator, memoryLimit: 1000 })
    expect(() => full([1000], 1, { backend: limited })).toThrow(/cannot allocate 4000 bytes/)
    limited.dispose()
  })

  test('a size that does not fit into 32 bits is an error', async () => {
    const backend = await open()
    const { handle } = tensor([1], undefined, { backend })
    const index = backend.upload(Int32Array.of(0), [1], 'i32')
    const take = (rows: number) =>
      backend.primitives.takeRows(
        [
          { handle, shape: [rows], dtype: 'f32' },
          { handle: index, shape: [1], dtype: 'i32' },
        ],
        {},
        [{ shape: [1], dtype: 'f32' }],
      )
    take(2 ** 31 - 1)
    for (const rows of [2 ** 31, 2 ** 32 + 1]) {
      expect(() => take(rows)).toThrow(
        expect.objectContaining({
          code: 'E_UNSUPPORTED',
          message: expect.stringMatching(`${rows}.*integers of 32 bits`),
        }),
      )
    }
    backend.dispose()
  })

  test('reading a tensor reports if the host, not the device, is out of memory, and takes no more than needed', async () => {
    const { driver, memory, stream, modules, context } = await openCuda(emulator)
    const calls = driver.call as { cuMemHostAlloc: (...args: unknown[]) => number }
    const taken: unknown[] = []
    const { cuMemHostAlloc } = calls
    calls.cuMemHostAlloc = (...args) => {
      taken.push(args[1])
      return cuMemHostAlloc(...args)
    }
    const bytes = 2 ** 26 + 12
    const { pointer } = memory.allocate(4)
    fail('cuMemHostAlloc', 1, 2)
    // Only this many bytes of host memory are asked for; so many are not on the device.
    const error = await stream.download(pointer, new Uint8Array(bytes)).catch(cause => cause)
    expect(error).toMatchObject({ code: 'E_OUT_OF_MEMORY', op: 'download' })
    expect(error.message).toMatch(/67108876 bytes of pinned host memory.*memory of the host/)
    expect(taken).toEqual([bytes])
    for (const part of [memory, modules, stream]) part.dispose()
    context.release()
  })

  describe.each([0, 1])('uploads to a device that can read host memory: %i', reads => {
    const set = (value: number) =>
      emulatorFunction('void moe_emulator_set(const char* name, int value)')('readsHost', value)
    beforeEach(() => set(reads))
    afterEach(() => set(0))

    test.each([3, 40_000, 1_200_000])('read all of %i numbers before the call returns', async n => {
      const backend = await open()
      const data = new Float32Array(n)
      const handles = Array.from({ length: n > 1e6 ? 3 : 40 }, (_, i) => backend.upload(data.fill(i + 1), [n], 'f32'))
      for (const [i, handle] of handles.entries()) {
        const got = await backend.download({ handle, shape: [n], dtype: 'f32' })
        expect([got[0], got[n - 1]]).toEqual([i + 1, i + 1])
      }
      backend.dispose()
    })

    test('take no more host memory when repeated', async () => {
      const backend = await open()
      const x = tensor(new Float32Array(40_000), undefined, { backend })
      for (let i = 0; i < 50; i++) {
        backend.write(x, new Float32Array(40_000).fill(i))
        await backend.sync()
        if (i === 2) fail('cuMemHostAlloc', 1, 2)
      }
      expect((await x.values())[7]).toBe(49)
      backend.dispose()
    })
  })

  test('an upload does not wait for kernels launched before it', async () => {
    emulatorFunction('void moe_emulator_set(const char* name, int value)')('readsHost', 1)
    const backend = await open()
    fail('launch', 1, 719)
    const x = full([40_000], 1, { backend })
    backend.write(x, new Float32Array(40_000))
    await expect(backend.sync()).rejects.toMatchObject({ code: 'E_BACKEND' })
    backend.dispose()
    emulatorFunction('void moe_emulator_set(const char* name, int value)')('readsHost', 0)
  })

  test('after disposal with a pending read, no call reaches the driver', async () => {
    const backend = await open()
    const x = full([1000], 2, { backend })
    const graph = backend.capture(() => x.mul(2))
    graph.replay()
    const reads = [x.values(), backend.sync(), backend.elapsed(() => graph.replay())]
    backend.dispose()
    for (const read of reads) await expect(read).rejects.toMatchObject({ code: 'E_DISPOSED' })
    for (const use of [() => x.mul(2), () => graph.replay(), () => full([1], 0, { backend })])
      expect(use).toThrow(/the backend has been disposed/)
    await expect(x.values()).rejects.toMatchObject({ code: 'E_DISPOSED' })
    graph.result.dispose()
    graph.dispose()
    x.dispose()
    backend.dispose()
    expect(emulatorFunction('const char* moe_emulator_report()')()).toBe('')
  })

  test.each([1, 2])('a read that is finished at query %i touches no memory after disposal', async finished => {
    const { driver, memory, stream, modules, context } = await openCuda(emulator)
    const calls = driver.call as { cuEventQuery: (event: number) => number; cuMemHostAlloc: Call; cuMemFreeHost: Call }
    type Call = (...args: unknown[]) => number
    const { cuEventQuery, cuMemHostAlloc, cuMemFreeHost } = calls
    calls.cuEventQuery = event => {
      // The emulator's first answer is always that the work is not finished.
      if (finished === 1) cuEventQuery(event)
      return cuEventQuery(event)
    }
    let pinned = 0
    calls.cuMemHostAlloc = (...args) => {
      pinned++
      return cuMemHostAlloc(...args)
    }
    calls.cuMemFreeHost = (...args) => {
      pinned--
      return cuMemFreeHost(...args)
    }
    const { pointer } = memory.allocate(160_000)
    stream.upload(pointer, new Float32Array(40_000), 'upload')
    const reads = [4, 160_000].map(bytes => stream.download(pointer, new Uint8Array(bytes)))
    for (const part of [memory, modules, stream]) part.dispose()
    context.release()
    for (const read of reads) await expect(read).rejects.toMatchObject({ code: 'E_DISPOSED' })
    expect(pinned).toBe(0)
  })

  test('a queue may be disposed of twice, and is not used afterwards', async () => {
    const backend = await open()
    const queue = backend.interop.queue()
    queue.dispose()
    queue.dispose()
    expect(() => queue.waitForBackend()).toThrow(expect.objectContaining({ code: 'E_DISPOSED' }))
    await expect(queue.synchronize()).rejects.toMatchObject({ code: 'E_DISPOSED' })
    backend.dispose()
    expect(emulatorFunction('const char* moe_emulator_report()')()).toBe('')
  })

  test('two backends share the context until the last one is disposed', async () => {
    const backend = await open()
    const other = await createBackend(emulator)
    backend.dispose()
    expect([...(await tensor([3], [1], { backend: other }).neg().values())]).toEqual([-3])
    other.dispose()
  })

  test('two processes can use one device', async () => {
    const backend = await open()
    const program = `
      import { createBackend } from ${JSON.stringify(join(import.meta.dirname, 'index.ts'))}
      import { tensor } from '@moe/core'
      const backend = await createBackend(${JSON.stringify(emulator)})
      console.log(...await tensor([1, 2], [2], { backend }).neg().values())`
    const { stdout } = spawnSync(process.execPath, ['--input-type=module', '-e', program], {
      cwd: import.meta.dirname,
      encoding: 'utf8',
    })
    expect(stdout.trim()).toBe('-1 -2')
    expect([...(await tensor([3], [1], { backend }).neg().values())]).toEqual([-3])
    backend.dispose()
  })

  describe('two concurrent generations', () => {
    const config = {
      ...presets.tiny,
      vocab_size: 64,
      hidden_size: 32,
      intermediate_size: 32,
      moe_intermediate_size: 16,
      num_hidden_layers: 1,
      num_attention_heads: 2,
      n_routed_experts: 8,
      num_experts_per_tok: 2,
      num_nextn_predict_layers: 1,
      eos_token_id: null,
    }
    async function generated(
      model: DeepSeek,
      options: GenerateOptions,
      onToken?: (n: number) => void,
    ): Promise<number[]> {
      const ids: number[] = []
      for await (const id of model.generate([1, 2, 3], options)) onToken?.(ids.push(id))
      return ids
    }

    test('give the same tokens as separate ones, even if one is cancelled during a replay', async () => {
      const backend = await open()
      const model = new DeepSeek(config, { seed: 1, backend })
      const alone = await generated(model, { maxTokens: 10, speculative: true })
      const { handles } = backend.stats()
      const abort = new AbortController()
      const options = { maxTokens: 1000, speculative: true, signal: abort.signal, temperature: 0.9 }
      const stopped = generated(model, options, n => n === 6 && setImmediate(() => abort.abort()))
      const [concurrent] = await Promise.all([
        generated(model, { maxTokens: 10, speculative: true }),
        expect(stopped).rejects.toMatchObject({ code: 'E_ABORTED' }),
      ])
      expect(concurrent).toEqual(alone)
      expect(backend.stats().handles).toBe(handles)
      model.dispose()
      expect(backend.stats().handles).toBe(0)
      backend.dispose()
    })

    test.each([10, 80, 400])(
      'both fail if the device is lost at launch %i, and leave nothing allocated',
      async after => {
        const backend = await open()
        const model = new DeepSeek(config, { seed: 1, backend })
        fail('launch', after, 719)
        const both = await Promise.allSettled([
          generated(model, { maxTokens: 40, speculative: true }),
          generated(model, { maxTokens: 40 }),
        ])
        for (const { status, reason } of both as PromiseRejectedResult[]) {
          expect([status, reason.code, reason.details]).toMatchObject(['rejected', 'E_BACKEND', { lost: true }])
        }
        model.dispose()
        expect(backend.stats().handles).toBe(0)
        backend.dispose()
      },
    )
  })

  test('if the device is lost during training, the step fails and the run resumes from the last checkpoint', async () => {
    const backend = await open()
    setDefaultBackend(backend)
    const config = { ...presets.tiny, vocab_size: 64, hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1 }
    const random = new Random(1)
    const data = TokenDataset.fromTokens([Int32Array.from({ length: 2000 }, () => random.integer(64))])
    const out = join(folder, 'run')
    const run = (resume: boolean, onStep: (step: number) => void) =>
      train(new DeepSeek({ ...config, num_nextn_predict_layers: 0 }, { seed: 1 }), {
        data: { training: data },
        steps: 6,
        batchSize: 2,
        sequenceLength: 16,
        out,
        checkpointEvery: 2,
        resume,
        progress: false,
        handleSignals: false,
        onEvent: event => {
          if (event.type === 'step') onStep(event.step)
        },
      })
    const error = await run(false, step => {
      if (step === 3) fail('launch', 20, 719)
    }).then(
      () => undefined,
      caught => caught as MoeError,
    )
    expect(error).toMatchObject({ code: 'E_BACKEND', details: { lost: true } })
    expect(error?.message).toMatch(
      /this process can no longer use the device: restart it and resume from the last checkpoint/,
    )
    backend.dispose()

    setDefaultBackend(await open())
    const steps: number[] = []
    await run(true, step => steps.push(step))
    expect(steps).toEqual([3, 4, 5, 6])
  })
})
