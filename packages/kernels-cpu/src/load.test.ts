import { copyFileSync, existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'
import { firstAvailable, isMoeError, type MoeError } from '@moe/core'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { createBackend, profile, startProfile, stopProfile } from './index.ts'
import { failure as failureOf, isas, type NativeLibrary } from './load.ts'
import { libraryName, platformName } from './platforms.mjs'
import { highestIsa } from './test-backend.ts'

const variables = ['MOE_CPU_LIBRARY', 'MOE_CPU_ISA', 'MOE_NUM_THREADS'] as const
const saved = new Map(variables.map(name => [name, process.env[name]]))
let folder = ''

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'moe-load-'))
  for (const name of variables) delete process.env[name]
})

afterEach(() => {
  try {
    rmSync(folder, { recursive: true })
  } catch (error) {
    // Windows does not delete a loaded library.
    if (process.platform !== 'win32') throw error
  }
  for (const [name, value] of saved) {
    if (value === undefined) delete process.env[name]
    else process.env[name] = value
  }
})

const failure = async () =>
  createBackend().then(
    () => undefined,
    error => error as MoeError,
  )

describe('finding the library', () => {
  test('a missing library is E_NO_BACKEND with the places tried and the fix, and firstAvailable tries the next backend', async () => {
    process.env['MOE_CPU_LIBRARY'] = folder
    const error = await failure()
    expect(isMoeError(error, 'E_NO_BACKEND')).toBe(true)
    expect(error?.message).toContain(folder)
    expect(error?.message).toContain('build-native.mjs')
    const reasons: string[] = []
    const loaders = [() => import('./index.ts'), () => import('@moe/core/reference')]
    const backend = await firstAvailable(loaders, { onSkip: reason => reasons.push(reason) })
    expect(backend.name).toBe('reference')
    expect(reasons).toEqual([error?.message])
  })

  test('an invalid library file is E_NO_BACKEND, not a crash', async () => {
    writeFileSync(join(folder, libraryName('baseline', process.platform)), 'not a library')
    process.env['MOE_CPU_LIBRARY'] = folder
    const error = await failure()
    expect(isMoeError(error, 'E_NO_BACKEND')).toBe(true)
    expect(error?.message).toContain('failed to load')
  })

  test('a folder with the library of only one instruction set is enough, as built for one machine', async () => {
    const { isa } = await createBackend()
    if (isa === 'baseline') return
    const build = join(import.meta.dirname, '..', 'build', platformName(process.platform, process.arch))
    const file = libraryName(isa, process.platform)
    copyFileSync(join(build, file), join(folder, file))
    process.env['MOE_CPU_LIBRARY'] = folder
    expect((await createBackend()).isa).toBe(isa)
    process.env['MOE_CPU_ISA'] = 'baseline'
    const error = await failure()
    expect(isMoeError(error, 'E_NO_BACKEND')).toBe(true)
    expect(error?.message).toMatch(/no library for baseline or a lower instruction set.*build all libraries/s)
  })

  test('MOE_CPU_ISA and MOE_NUM_THREADS are respected; invalid values are E_CONFIG', async () => {
    process.env['MOE_CPU_ISA'] = 'baseline'
    process.env['MOE_NUM_THREADS'] = '3'
    const backend = await createBackend()
    expect([backend.isa, backend.threads, backend.bf16Matmul]).toEqual(['baseline', 3, false])
    expect(backend.device).toMatch(/(SSE2|NEON), 3 threads$/)
    process.env['MOE_CPU_ISA'] = 'sse9'
    expect(isMoeError(await failure(), 'E_CONFIG')).toBe(true)
    // Instruction sets of another architecture are invalid.
    const foreign = createBackend({ isa: process.arch === 'arm64' ? 'avx2' : 'dotprod' })
    await expect(foreign).rejects.toThrow(/isa is \w+.*expected baseline, /s)
    delete process.env['MOE_CPU_ISA']
    process.env['MOE_NUM_THREADS'] = '0'
    expect(isMoeError(await failure(), 'E_CONFIG')).toBe(true)
  })
})

test.each([
  [1, 'E_BACKEND'],
  [2, 'E_OUT_OF_MEMORY'],
])('status %i of a kernel becomes %s with the message of the library', (status, code) => {
  const error = failureOf({ lastError: () => 'why' } as NativeLibrary, 'exp', status)
  expect(error).toMatchObject({ code, op: 'exp', message: expect.stringMatching(/^exp: why/) })
})

test('a kernel that fails throws, and its op leaves nothing allocated', async () => {
  const backend = await createBackend()
  const shape = Array(12).fill(2)
  const x = { handle: backend.upload(new Float32Array(2 ** 12), shape, 'f32'), shape, dtype: 'f32' as const }
  const { handles } = backend.stats()
  const axes = [1, 3, 5, 7, 9, 11, 0, 2, 4, 6, 8, 10]
  expect(() => backend.primitives.permute([x], { axes }, [{ shape, dtype: 'f32' }])).toThrow(
    expect.objectContaining({ code: 'E_BACKEND', message: expect.stringMatching(/axes are left/) }),
  )
  expect(backend.stats().handles).toBe(handles)
  backend.dispose()
})

test('each instruction set that is built and that the CPU has can be chosen', async () => {
  const build = join(import.meta.dirname, '..', 'build', platformName(process.platform, process.arch))
  const highest = await highestIsa()
  const built = isas.filter(isa => existsSync(join(build, libraryName(isa, process.platform))))
  for (const isa of built) {
    const lower = Math.min(isas.indexOf(isa), isas.indexOf(highest))
    expect((await createBackend({ isa })).isa).toBe(isas[lower])
  }
  if (process.platform !== 'linux' || process.arch !== 'x64') return
  const flags =
    readFileSync('/proc/cpuinfo', 'utf8')
      .match(/^flags\s*:.*$/m)?.[0]
      .split(/\s+/) ?? []
  const needed = {
    baseline: 'sse2',
    avx2: 'avx2',
    avx512: 'avx512vl',
    avx512vnni: 'avx512_vnni',
    avx512bf16: 'avx512_bf16',
  }
  expect(highest).toBe(built.findLast(isa => flags.includes(needed[isa as keyof typeof needed])))
})

test('Intel CPUs multiply in f32 by default, because their bf16 vector instructions are slower', async () => {
  const [fastest, highest] = [await createBackend(), await createBackend({ isa: await highestIsa() })]
  const slow = highest.isa === 'avx512bf16' && fastest.device.includes('Intel')
  expect([fastest.isa, fastest.bf16Matmul]).toEqual(slow ? ['avx512vnni', false] : [highest.isa, highest.bf16Matmul])
  for (const backend of [fastest, highest]) backend.dispose()
})

test('concurrent JavaScript threads compute equal results', async () => {
  const source = `
    const { parentPort } = require('node:worker_threads')
    import(${JSON.stringify(new URL('./index.ts', import.meta.url).href)}).then(async ({ createBackend }) => {
      const backend = await createBackend({ threads: 2 })
      const shape = [300, 1000], spec = { shape, dtype: 'f32' }
      const data = Float32Array.from({ length: 300000 }, (_, i) => Math.sin(i))
      let value = { handle: backend.upload(data, shape, 'f32'), ...spec }
      for (let i = 0; i < 300; i++) {
        const [handle] = backend.primitives.unary([value], { code: i % 2 ? 'sin' : 'tanh' }, [spec])
        backend.free(value.handle)
        value = { handle, ...spec }
      }
      parentPort.postMessage(await backend.download(value))
    }).catch(error => { throw error })`
  const results = await Promise.all(
    [0, 1, 2].map(
      () =>
        new Promise<Float32Array>((resolve, reject) => {
          const worker = new Worker(source, { eval: true })
          worker.on('message', resolve).on('error', reject)
        }),
    ),
  )
  expect(results[1]).toEqual(results[0])
  expect(results[2]).toEqual(results[0])
  expect(results[0].some(x => x !== 0)).toBe(true)
})

test('the profile contains calls and time per op', async () => {
  const backend = await createBackend()
  const spec = { shape: [4], dtype: 'f32' as const }
  const x = { handle: backend.upload(new Float32Array(4), [4], 'f32'), ...spec }
  startProfile()
  for (let i = 0; i < 3; i++) backend.free(backend.primitives.unary([x], { code: 'exp' }, [spec])[0])
  stopProfile()
  backend.free(backend.primitives.unary([x], { code: 'exp' }, [spec])[0])
  const found = profile()
  expect(found).toEqual([{ op: 'unary', calls: 3, milliseconds: expect.any(Number) }])
  expect(found[0].milliseconds).toBeGreaterThan(0)
  backend.dispose()
})
