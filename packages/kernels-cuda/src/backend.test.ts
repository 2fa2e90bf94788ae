import { fallbacks } from '@moe/core'
import { backendSuite } from '@moe/core/testing'
import { afterEach, describe, expect, test } from 'vitest'
import { createBackend } from './backend.ts'
import { hopperOps } from './native.ts'
import { type CudaOptions, openCuda } from './open.ts'
import {
  emulator,
  emulatorFunction,
  hopperFp8Bits,
  keepFp8Bits,
  onDevice,
  testBackend,
  unavailable,
  wgmmaVariants,
} from './test-backend.ts'

/**
 * The suite runs every case twice and expects identical bits. The emulator runs blocks and threads of the second run in reverse order, so that a result
 * that depends on their order, also through global memory, fails. Called after the forward and after the backward pass of each run.
 */
function reverseEverySecondRun(): () => void {
  if (unavailable || onDevice) return () => {}
  const set = emulatorFunction('void moe_emulator_set(const char* name, int value)')
  let calls = 0
  set('reversed', 0)
  return () => {
    calls++
    set('reversed', calls % 4 >= 2 ? 1 : 0)
  }
}

// A fault makes a backend unusable, so each check has its own. Products are also tested with the Hopper kernels.
const names = backendSuite(testBackend).map(check => check.name)

for (const wgmma of wgmmaVariants) {
  for (const [i, name] of names.entries()) {
    if (wgmma && !onDevice && !/matmul|experts|cross-?entropy|attention/i.test(name)) continue
    test.skipIf(unavailable)(wgmma ? `wgmma: ${name}` : name, async () => {
      let backend: Awaited<ReturnType<typeof testBackend>> | undefined
      const make = async () => {
        backend = await testBackend({ wgmma })
        return backend
      }
      try {
        const bits = wgmma ? { fp8Bits: hopperFp8Bits } : {}
        keepFp8Bits(wgmma ? hopperFp8Bits : 0)
        await backendSuite(make, { guards: reverseEverySecondRun(), ...bits })[i].run()
        await backend?.sync()
      } finally {
        keepFp8Bits(0)
        backend?.dispose()
      }
    })
  }
}

test.skipIf(unavailable || onDevice)('products use the Hopper kernels if enabled and on a Hopper device', async () => {
  for (const wgmma of [false, true]) {
    const backend = await testBackend({ wgmma })
    expect(backend.wgmma).toBe(wgmma)
    backend.dispose()
  }
  emulatorFunction('void moe_emulator_set(const char* name, int value)')('capability', 100)
  const newer = await createBackend({ ...emulator, wgmma: true })
  expect(newer.wgmma).toBe(false)
  newer.dispose()
})

describe.skipIf(unavailable || onDevice)('MOE_CUDA_WGMMA', () => {
  afterEach(() => {
    delete process.env['MOE_CUDA_WGMMA']
  })
  const usedWith = async (value: string, options: CudaOptions = {}) => {
    process.env['MOE_CUDA_WGMMA'] = value
    emulatorFunction('void moe_emulator_set(const char* name, int value)')('capability', 90)
    const opened = await openCuda({ ...emulator, ...options })
    const used = hopperOps.filter(op => opened.cuda.onHopper(op))
    opened.memory.dispose()
    opened.modules.dispose()
    opened.stream.dispose()
    opened.context.release()
    return used
  }

  test.each([
    ['', undefined, []],
    ['0', undefined, []],
    ['1', undefined, hopperOps],
    ['1', false, []],
    ['', true, hopperOps],
    ['attention,matmul', undefined, ['matmul', 'attention']],
    ['attention,matmul', true, ['matmul', 'attention']],
    ['attention,matmul', false, []],
  ])('"%s" and the option wgmma %s select the Hopper kernels of the expected ops', async (value, wgmma, ops) => {
    expect(await usedWith(value, { wgmma })).toEqual(ops)
  })

  test('naming an op without a Hopper kernel is an error', async () => {
    await expect(usedWith('attention,softmax')).rejects.toMatchObject({ code: 'E_CONFIG' })
  })
})

test.skipIf(unavailable)('no fused op of the suite uses its decomposition, except experts in f32', () => {
  // Without bf16, activations between the products are f32 anyway.
  const declined = ['routedExperts', 'routedExpertsBackward']
  const decomposed = fallbacks().filter(({ backend }) => backend === 'kernels-cuda')
  expect(decomposed.filter(({ op }) => !declined.includes(op))).toEqual([])
})
