/** @file Dense products with cuBLASLt: on the emulator with a replacement that checks its arguments, with MOE_CUDA_CUBLASLT=1 on a device with the real library. */
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { isMoeError, type MoeError, Random, randn, scope, type Tensor, type WidePrecision } from '@moe/core'
import { backendSuite, graphSuite, runOp } from '@moe/core/testing'
import koffi from 'koffi'
import { afterAll, afterEach, describe, expect, onTestFinished, test } from 'vitest'
import { createBackend } from '../backend.ts'
import { gemm } from '../kernels/matmul/gemm.ts'
import { type CudaOptions, openCuda } from '../open.ts'
import { distance, exact, onCpu, onCuda, output } from '../test-against-cpu.ts'
import {
  cublasLtVariants,
  emulatedCublasLt,
  emulator,
  emulatorFunction,
  onDevice,
  resetEmulator,
  testBackend,
  unavailable,
} from '../test-backend.ts'
import { candidates } from './candidates.ts'
import { fastest } from './fastest.ts'
import { limits } from './products.ts'

const folder = mkdtempSync(join(tmpdir(), 'moe-cublas-lt-'))
afterAll(() => rmSync(folder, { recursive: true }))

const forms = [false, true].flatMap(transposeA => [false, true].map(transposeB => ({ transposeA, transposeB })))
const precisions: readonly WidePrecision[] = ['f32', 'bf16']

/** Odd sizes, sizes of 1, and a k for which the heuristic chooses split-K. */
const sizes = [
  { name: 'multiples of tiles', m: 64, n: 128, k: 64 },
  { name: 'odd sizes', m: 37, n: 41, k: 29 },
  { name: 'one column', m: 130, n: 1, k: 7 },
  { name: 'one k', m: 9, n: 5, k: 1 },
  { name: 'split-K', m: 30, n: 41, k: 2101 },
  { name: 'a batch', batch: 5, m: 33, n: 17, k: 21 },
  { name: 'a batch, split-K', batch: 3, m: 20, n: 12, k: 300 },
]

describe.skipIf(unavailable).each(cublasLtVariants)('cuBLASLt', options => {
  test.each(precisions.flatMap(precision => sizes.map(size => ({ precision, ...size }))))(
    '$name, $precision',
    async ({ precision, batch, m, n, k }) => {
      const random = new Random(m)
      const lead = batch === undefined ? [] : [batch]
      for (const { transposeA, transposeB } of forms) {
        const inputs = [
          exact(random, ...lead, ...(transposeA ? [k, m] : [m, k])),
          exact(random, ...lead, ...(transposeB ? [n, k] : [k, n])),
        ]
        const attrs = { transposeA, transposeB, precision }
        const outputs = [output(...lead, m, n)]
        const [first] = await onCuda('matmul', inputs, attrs, outputs, options)
        expect(distance(first, (await onCpu('matmul', inputs, attrs, outputs))[0])).toBeLessThan(2e-6)
        const [second] = await onCuda('matmul', inputs, attrs, outputs, options)
        expect(second).toEqual(first)
      }
    },
  )

  for (const [i, { name }] of backendSuite(testBackend).entries()) {
    if (!/^(matmul|quantizedMatmul|linearCrossEntropy|training)/.test(name)) continue
    test(`suite: ${name}`, async () => {
      const backend = await testBackend(options)
      await backendSuite(async () => backend)[i].run()
      backend.dispose()
    })
  }

  for (const check of graphSuite(() => testBackend({ guarded: false, ...options }))) test(check.name, () => check.run())

  test.each(precisions)('a graph keeps its own workspace, %s', async precision => {
    const backend = await testBackend({ guarded: false, ...options })
    const make = (seed: number, shape: number[]) => randn(shape, new Random(seed), { backend })
    const [a, b, other] = [make(1, [40, 600]), make(2, [30, 600]), make(3, [40, 600])]
    const product = (x: Tensor) =>
      scope(() => x.matmul(b, { transposeB: true, precision }).matmul(b, { precision }).mul(2))
    product(a).dispose()
    const graph = backend.capture(() => product(a))
    const expected = await product(other).values()
    backend.write(a, await other.values())
    // Ops in between use the memory that was free.
    const busy = Array.from({ length: 6 }, (_, i) => make(4 + i, [40, 600]).matmul(b, { transposeB: true, precision }))
    graph.replay()
    expect(await graph.result.values()).toEqual(expected)
    for (const tensor of busy) tensor.dispose()
    graph.replay()
    expect(await graph.result.values()).toEqual(expected)
    backend.dispose()
  })
})

describe.skipIf(unavailable || onDevice)('cuBLASLt, emulated', () => {
  const lt = <T>(prototype: string) => koffi.load(emulatedCublasLt).func(prototype) as unknown as T
  const calls = () => lt<() => number>('size_t moe_cublas_lt_calls()')()
  const living = () => lt<() => number>('size_t moe_cublas_lt_living()')()
  const setVersion = (version: number) =>
    lt<(version: number) => void>('void moe_cublas_lt_set_version(size_t version)')(version)
  const fail = (call: string, after: number, status: number) =>
    emulatorFunction('void moe_emulator_fail(const char* call, int after, int status)')(call, after, status)
  const open = (more: CudaOptions = {}) => testBackend({ cublasLt: emulatedCublasLt, ...more })

  const [m, n, k] = [20, 24, 300]
  const inputs = [exact(new Random(1), m, k), exact(new Random(2), n, k)]
  const outputs = [output(m, n)]
  const attrs = (precision: WidePrecision) => ({ transposeA: false, transposeB: true, precision })
  type Backend = Awaited<ReturnType<typeof createBackend>>
  const multiply = (backend: Backend, precision: WidePrecision = 'bf16') =>
    runOp(backend, 'matmul', inputs, attrs(precision), outputs)
  /** Computes the product with this package's kernels. */
  const own = async (options: CudaOptions = {}) => (await onCuda('matmul', inputs, attrs('bf16'), outputs, options))[0]

  async function failure(action: () => Promise<unknown>): Promise<MoeError> {
    try {
      await action()
    } catch (error) {
      return error as MoeError
    }
    throw new Error('it worked')
  }

  /** Makes the library look like part of a toolkit. */
  function install(): void {
    const lib = join(mkdtempSync(join(folder, 'toolkit-')), 'lib64')
    mkdirSync(lib)
    symlinkSync(emulatedCublasLt, join(lib, 'libcublasLt.so.13'))
    symlinkSync(emulator.driver, join(lib, 'libmoe-cuda-emulator.so'))
    process.env['CUDA_HOME'] = dirname(lib)
    onTestFinished(() => {
      delete process.env['CUDA_HOME']
    })
  }

  afterEach(() => {
    resetEmulator()
    setVersion(130101)
  })

  test('it computes products except those with few rows or no elements, and frees everything', async () => {
    const before = living()
    const backend = await open()
    expect(backend.cublasLt).toBe('13.1.1')
    const start = calls()
    await multiply(backend, 'f32')
    await multiply(backend, 'bf16')
    await multiply(backend, 'bf16')
    expect(calls() - start).toBe(3)
    const few = [exact(new Random(1), 8, k), inputs[1]]
    await runOp(backend, 'matmul', few, attrs('bf16'), [output(8, n)])
    for (const [rows, inner] of [
      [0, k],
      [m, 0],
    ]) {
      const empty = [exact(new Random(1), rows, inner), exact(new Random(1), n, inner)]
      await runOp(backend, 'matmul', empty, attrs('f32'), [output(rows, n)])
    }
    expect(calls() - start).toBe(3)
    expect(backend.stats().handles).toBe(0)
    // The handle, and two products with a descriptor and three layouts each.
    expect(living() - before).toBe(9)
    backend.dispose()
    backend.dispose()
    expect(living()).toBe(before)
  })

  test('products that differ in a single property are distinguished', async () => {
    resetEmulator()
    const { cuda, memory, stream } = await openCuda({ ...emulator, cublasLt: emulatedCublasLt })
    const product = gemm(cuda)
    const random = new Random(9)
    /** Uploads numbers with NaN padding after each row. */
    const matrix = (rows: number, ld: number, columns: number) => {
      const host = random.normal(rows * ld).map((x, i) => (i % ld < columns ? x : Number.NaN))
      const { pointer } = memory.allocate(host.byteLength)
      stream.upload(pointer, host, 'test')
      return { host, pointer, ld }
    }
    const size = 12
    const base = { transposeA: false, transposeB: false, lda: size, ldb: size, batch: 1, add: false }
    const variations: Array<Partial<typeof base>> = [
      {},
      { transposeA: true },
      { transposeB: true },
      { lda: 16 },
      { ldb: 20 },
      { batch: 3 },
      { batch: 3, lda: 16 },
      { add: true },
    ]
    // Twice: the second time they are cached.
    for (const variation of [...variations, ...variations]) {
      const { transposeA, transposeB, lda, ldb, batch, add } = { ...base, ...variation }
      const [a, b, c] = [lda, ldb, size].map(ld => matrix(batch * size, ld, size))
      memory.begin('test')
      product('f32', c.pointer, a, b, { m: size, n: size, k: size, transposeA, transposeB, batch, add })
      memory.end()
      const found = new Float32Array(c.host.length)
      await stream.download(c.pointer, found)
      const expected = c.host.map((before, at) => {
        const [matrixOf, row, column] = [Math.floor(at / size ** 2) * size, Math.floor(at / size) % size, at % size]
        let sum = add ? before : 0
        for (let i = 0; i < size; i++) {
          const left = transposeA ? (matrixOf + i) * lda + row : (matrixOf + row) * lda + i
          const right = transposeB ? (matrixOf + column) * ldb + i : (matrixOf + i) * ldb + column
          sum += a.host[left] * b.host[right]
        }
        return sum
      })
      expect(distance(found, expected)).toBeLessThan(2e-6)
    }
    memory.dispose()
    cuda.cublasLt?.dispose()
    stream.dispose()
  })

  test('the number of cached descriptions of products is limited', async () => {
    const usual = limits.plans
    limits.plans = 2
    onTestFinished(() => {
      limits.plans = usual
    })
    const backend = await open()
    const before = living()
    for (let rows = 10; rows < 15; rows++) {
      const a = exact(new Random(rows), rows, k)
      const [c] = await runOp(backend, 'matmul', [a, inputs[1]], attrs('f32'), [output(rows, n)])
      const [expected] = await onCpu('matmul', [a, inputs[1]], attrs('f32'), [output(rows, n)])
      expect(distance(c, expected)).toBeLessThan(2e-6)
    }
    expect(living() - before).toBe(8)
    backend.dispose()
  })

  test.each([false, true])('our own kernels are used if the heuristic returns no algorithm, wgmma %s', async wgmma => {
    const expected = await own({ wgmma })
    const backend = await open({ wgmma })
    fail('cublasLtMatmulAlgoGetHeuristic', 1, 15)
    const start = calls()
    expect((await multiply(backend))[0]).toEqual(expected)
    expect((await multiply(backend))[0]).toEqual(expected)
    expect(calls()).toBe(start)
    backend.dispose()
  })

  test('it computes products even if the Hopper kernels are enabled', async () => {
    const backend = await open({ wgmma: true })
    const start = calls()
    for (const { transposeA, transposeB } of forms) {
      const a = exact(new Random(1), ...(transposeA ? [k, m] : [m, k]))
      const b = exact(new Random(2), ...(transposeB ? [n, k] : [k, n]))
      const [c] = await runOp(backend, 'matmul', [a, b], { transposeA, transposeB, precision: 'bf16' }, outputs)
      const [expected] = await onCpu('matmul', [a, b], { transposeA, transposeB, precision: 'f32' }, outputs)
      expect(distance(c, expected)).toBeLessThan(2e-6)
    }
    expect(calls() - start).toBe(4)
    backend.dispose()
  })

  test.each([
    ['cublasLtMatmul', 13, 'CUBLAS_STATUS_EXECUTION_FAILED'],
    ['cublasLtMatmulAlgoGetHeuristic', 7, 'CUBLAS_STATUS_INVALID_VALUE'],
  ])(
    'if %s returns %i, the error names op, shapes and status, and the next product works',
    async (call, status, name) => {
      const backend = await open()
      const before = living()
      fail(call, 1, status)
      const error = await failure(() => multiply(backend))
      expect(error).toMatchObject({ code: 'E_BACKEND', details: { status, name, lost: false } })
      expect(error.message).toContain(
        `matmul: cuBLASLt 13.1.1 returned ${name} (${status}) for bf16 [20,300] x [24,300]^T`,
      )
      expect(error.message).toContain('MOE_CUDA_CUBLASLT=0')
      await multiply(backend)
      expect(living() - before).toBe(4)
      backend.dispose()
    },
  )

  test('a lost device is reported as such', async () => {
    const backend = await open()
    await multiply(backend)
    fail('launch', 1, 719)
    await failure(() => multiply(backend))
    const error = await failure(() => multiply(backend))
    expect(error).toMatchObject({ code: 'E_BACKEND', details: { lost: true } })
    backend.dispose()
  })

  test('measured: timed at the first product of each size, then reused; captures use our own kernels', async () => {
    install()
    const expected = await own()
    const backend = await testBackend({ cublasLt: 'measured', guarded: false })
    expect(backend.cublasLt).toBe('13.1.1')
    const [a, b] = inputs.map(({ data, shape }) => ({
      handle: backend.upload(Float32Array.from(data), shape, 'f32'),
      shape,
      dtype: 'f32' as const,
    }))
    const run = () => backend.primitives.matmul([a, b], attrs('bf16'), outputs)[0]
    const download = (handle: unknown) => backend.download({ handle: handle as never, ...outputs[0] })
    const start = calls()
    const graph = backend.capture(run)
    graph.replay()
    expect(await download(graph.result)).toEqual(expected)
    expect(calls()).toBe(start)

    const first = await download(run())
    expect(distance(first, expected)).toBeLessThan(2e-6)
    // Two algorithms, each run once to be loaded and three times to be timed; then the selected one.
    const taken = calls() - start - 8
    expect([0, 1]).toContain(taken)
    expect(await download(run())).toEqual(first)
    expect(calls() - start - 8).toBe(2 * taken)
    const again = backend.capture(run)
    again.replay()
    expect(await download(again.result)).toEqual(first)
    backend.dispose()
  })

  test('measured: timing does not change the accumulator of the product', async () => {
    install()
    const [rows, classes, features] = [20, 300, 24]
    const random = new Random(3)
    const saved = [{ data: new Float32Array(rows).fill(6), shape: [rows] }, exact(random, rows)]
    const targets = { data: Array.from({ length: rows }, (_, i) => i), shape: [rows], dtype: 'i32' as const }
    const all = [exact(random, rows, features), exact(random, classes, features), targets, ...saved]
    const gradients = [output(rows, features), output(classes, features)]
    const { limits: chunk } = await import('../kernels/linear-cross-entropy/linear-cross-entropy.ts')
    const usual = chunk.chunkBytes
    chunk.chunkBytes = 20_000
    onTestFinished(() => {
      chunk.chunkBytes = usual
    })
    const settings = { ignoreIndex: -1, precision: 'f32' as const }
    const expected = await onCpu('linearCrossEntropyBackward', all, settings, gradients)
    const got = await onCuda('linearCrossEntropyBackward', all, settings, gradients, { cublasLt: 'measured' })
    got.forEach((gradient, i) => {
      expect(distance(gradient, expected[i])).toBeLessThan(1e-5)
    })
  })

  describe('search for the library', () => {
    test('is off by default, and is enabled by the environment variable as by the option', async () => {
      install()
      const versionWith = async (value: string | undefined, option?: boolean) => {
        if (value === undefined) delete process.env['MOE_CUDA_CUBLASLT']
        else process.env['MOE_CUDA_CUBLASLT'] = value
        const backend = await testBackend(option === undefined ? {} : { cublasLt: option })
        backend.dispose()
        return backend.cublasLt
      }
      onTestFinished(() => {
        delete process.env['MOE_CUDA_CUBLASLT']
      })
      expect(await versionWith(undefined)).toBeUndefined()
      expect(await versionWith('0')).toBeUndefined()
      expect(await versionWith('1')).toBe('13.1.1')
      expect(await versionWith('measured')).toBe('13.1.1')
      expect(await versionWith(emulatedCublasLt)).toBe('13.1.1')
      expect(await versionWith('1', false)).toBeUndefined()
      expect(await versionWith('0', true)).toBe('13.1.1')
    })

    test('silently skips a library that does not fit the driver or fails to start', async () => {
      install()
      setVersion(140000)
      const newer = await testBackend({ cublasLt: true })
      expect(newer.cublasLt).toBeUndefined()
      expect((await multiply(newer))[0]).toEqual(await own())
      newer.dispose()
      setVersion(130101)
      fail('cublasLtCreate', 1, 3)
      const broken = await createBackend({ ...emulator, cublasLt: true })
      expect(broken.cublasLt).toBeUndefined()
      broken.dispose()
    })

    test('rejects an unusable library that was given by path', async () => {
      const reason = async (path: string) => {
        const error = await failure(() => createBackend({ ...emulator, cublasLt: path }))
        expect(isMoeError(error, 'E_CONFIG')).toBe(true)
        expect(error.message).toContain(`cuBLASLt from ${path} cannot be used: `)
        return error.message
      }
      expect(await reason(join(folder, 'libcublasLt.so.13'))).toMatch(/cannot open|No such file/)
      writeFileSync(join(folder, 'text.so'), 'no library')
      await reason(join(folder, 'text.so'))
      expect(await reason(emulator.driver)).toMatch(/cublasLtGetVersion/)
      setVersion(140002)
      expect(await reason(emulatedCublasLt)).toMatch(
        /version 14\.0\.2 needs a driver for CUDA 14, but this one supports CUDA 13\.0/,
      )
      setVersion(111103)
      expect(await reason(emulatedCublasLt)).toMatch(/version 11\.11\.3, but 12 or later is required/)
      setVersion(130101)
      fail('cublasLtCreate', 1, 3)
      expect(await reason(emulatedCublasLt)).toMatch(/cublasLtCreate returned CUBLAS_STATUS_ALLOC_FAILED \(3\)/)
    })
  })
})

/** Creates an empty file at a possible path of the library. */
function put(...path: string[]): string {
  const file = join(folder, ...path)
  mkdirSync(dirname(file), { recursive: true })
  writeFileSync(file, '')
  return file
}

test('the library is searched for with the loader, in toolkits, then in Python environments', () => {
  const expected = [
    put('cuda', 'lib64', 'libcublasLt.so.12'),
    put('venv', 'lib', 'python3.12', 'site-packages', 'nvidia', 'cu13', 'lib', 'libcublasLt.so.13'),
    put('venv', 'lib', 'python3.12', 'site-packages', 'nvidia', 'cublas', 'lib', 'libcublasLt.so.12'),
    put('conda', 'lib', 'libcublasLt.so.13'),
  ]
  const environment = {
    CUDA_HOME: join(folder, 'cuda'),
    CUDA_PATH: join(folder, 'cuda'),
    VIRTUAL_ENV: join(folder, 'venv'),
    CONDA_PREFIX: join(folder, 'conda'),
  }
  const found = candidates(environment, 'linux')
  expect(found.filter(path => !path.startsWith('/usr/local/cuda'))).toEqual([
    'libcublasLt.so.13',
    'libcublasLt.so.12',
    ...expected,
  ])
})

test('on Windows, the library is searched for with the loader, in toolkits, then in Python environments', () => {
  const expected = [
    put('v13.0', 'bin', 'x64', 'cublasLt64_13.dll'),
    put('v12.8', 'bin', 'cublasLt64_12.dll'),
    put('venv', 'Lib', 'site-packages', 'torch', 'lib', 'cublasLt64_12.dll'),
    put('conda', 'Library', 'bin', 'cublasLt64_13.dll'),
  ]
  const environment = {
    CUDA_HOME: join(folder, 'v13.0'),
    CUDA_PATH: join(folder, 'v12.8'),
    VIRTUAL_ENV: join(folder, 'venv'),
    CONDA_PREFIX: join(folder, 'conda'),
  }
  expect(candidates(environment, 'win32')).toEqual(['cublasLt64_13.dll', 'cublasLt64_12.dll', ...expected])
})

test('the fastest candidate is the one with the shortest run; ties go to the first', () => {
  const runs: number[] = []
  const times: Record<number, number[]> = { 0: [3, 3, 3], 1: [9, 2, 9], 2: [2, 4, 4] }
  const candidates = [0, 1, 2].map(i => () => {
    runs.push(i)
  })
  const chosen = fastest(candidates, candidate => {
    candidate()
    return times[runs[runs.length - 1]].shift() as number
  })
  expect(chosen).toBe(1)
  expect(runs).toEqual([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
})
