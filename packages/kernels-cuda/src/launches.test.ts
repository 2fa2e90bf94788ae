/**
 * @file Checks that every launch is valid on each kind of device with published machine code: threads, registers and shared memory as reported by nvcc. The emulated device
 * rejects the grids and blocks that a real one would. It does not run the kernels here, so sizes can be those of DeepSeek-V3.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import {
  adamwStep,
  attention,
  type Backend,
  crossEntropy,
  type DType,
  dispatchPlan,
  full,
  globalNorm,
  gradients,
  groupedMatmul,
  indexScores,
  latentAttention,
  linearCrossEntropy,
  mlaKeyValue,
  quantize,
  quantizedMatmul,
  quantizeWeight,
  rmsNorm,
  rope,
  routedExperts,
  routerTopk,
  scope,
  softmax,
  swiglu,
  type Tensor,
  withPrecision,
} from '@moe/core'
import { afterAll, describe, expect, test } from 'vitest'
import { createBackend } from './backend.ts'
import { Modules } from './modules.ts'
import { emulator, emulatorFunction, onDevice, resetEmulator, unavailable } from './test-backend.ts'

/** Maximum shared memory of a block in KiB, by compute capability (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"). */
const sharedMemory = new Map([
  [80, 163],
  [86, 99],
  [89, 99],
  [90, 227],
  [100, 227],
  [120, 99],
])
const architectures = [...sharedMemory.keys()]
/** Registers of a multiprocessor, and therefore the maximum of a block. A warp gets them in units of 256 from one of four schedulers, each with a quarter of them. */
const mostRegisters = 65_536

interface Kernel {
  readonly name: string
  /** Registers per thread by architecture; undefined if the kernel is not built for it. */
  readonly registers: ReadonlyArray<number | undefined>
  readonly staticShared: number
}
const reported: Kernel[] = readFileSync(join(import.meta.dirname, '..', 'device', 'resources.txt'), 'utf8')
  .split('\n')
  .filter(line => line.startsWith('moe_'))
  .map(line => {
    const [name, ...columns] = line.split(/\s+/)
    return {
      name,
      registers: architectures.map((_, i) => (columns[i] === '-' ? undefined : Number(columns[i]))),
      staticShared: Number(columns[architectures.length]),
    }
  })

/** The ops of a layer of DeepSeek-V3 and of its training, with fewer experts and a smaller vocabulary, and sizes for other tiles and heads. Tensors are uninitialized. */
function ops(backend: Backend): Record<string, () => unknown> {
  const made = (dtype: DType, ...shape: number[]) => full(shape, 0, { dtype, backend })
  const given = (...shape: number[]) => made('f32', ...shape)
  /** Creates a tensor that gets a gradient like a parameter, but is freed with the other tensors of an op. */
  const learned = (...shape: number[]) => {
    const tensor = given(...shape)
    tensor.tracked = true
    return tensor
  }
  const ints = (...shape: number[]) => made('i32', ...shape)
  const back = (loss: Tensor, of: readonly Tensor[]) => {
    for (const gradient of gradients(loss.sum(), of)) gradient?.dispose()
  }
  const product = (m: number, n: number, k: number) => () => {
    const [x, w] = [learned(m, k), learned(n, k)]
    back(x.matmul(w, { transposeB: true }), [x, w])
  }
  const heads =
    (T: number, S: number, H: number, G: number, dk: number, dv: number, starts = false) =>
    () => {
      const of = [learned(1, T, H, dk), learned(1, S, G, dk), learned(1, S, G, dv)]
      const options = starts ? { starts: ints(1, T) } : {}
      back(attention(of[0], of[1], of[2], options), of)
    }
  const decode = (H: number, C: number, V: number, dtype: DType, page?: number) => () =>
    latentAttention(given(2, 1, H, C), made(dtype, page ? 9 : 2, page ?? 4096, C), ints(2), {
      scale: 0.1,
      valueDim: V,
      ...(page ? { pages: ints(2, 4) } : {}),
    })
  const experts = (N: number, D: number, I: number, E: number, K: number) => () => {
    const plan = dispatchPlan(ints(N, K), E)
    const [x, weights] = [learned(N, D), learned(N, K)]
    const [gate, up, down] = [learned(E, I, D), learned(E, I, D), learned(E, D, I)]
    back(routedExperts(x, { gate, up, down }, weights, plan), [x, weights, gate, up, down])
    const rows = learned(N * K, D)
    back(groupedMatmul(rows, gate, plan.offsets), [rows, gate])
    back(groupedMatmul(learned(N * K, I), gate, plan.offsets, { transposeW: false }), [gate])
  }
  const stored = (format: 'bf16' | 'fp8' | 'int8' | 'int4', rows: number, N: number, K: number) => () => {
    const x = learned(rows, K)
    back(quantizedMatmul(x, quantizeWeight(given(N, K), format)), [x])
  }
  const entropy = (N: number, V: number, D: number) => () => {
    const [x, w] = [learned(N, D), learned(V, D)]
    back(linearCrossEntropy(x, w, ints(N)), [x, w])
    const logits = learned(N, V)
    back(crossEntropy(logits, ints(N)), [logits])
  }
  const all: Record<string, () => unknown> = {
    norms: () => {
      for (const D of [24, 7168]) {
        const [x, w, y] = [learned(1024, D), learned(D), learned(1024, D)]
        back(rmsNorm(x, w, 1e-6), [x, w])
        back(softmax(y), [y])
        back(swiglu(x, y), [x, y])
      }
    },
    rope: () => {
      const [x, kv, key] = [learned(1, 512, 128, 64), learned(1, 512, 128, 256), learned(1, 512, 1, 64)]
      back(rope(x, given(512, 32), given(512, 32)), [x])
      const { k, v } = mlaKeyValue(kv, key, 128)
      back(k.sum().add(v.sum()), [kv, key])
    },
    optimizer: () => {
      const g = given(2048, 7168)
      globalNorm([g])
      for (const moments of ['f32', 'bf16'] as const) {
        const [p, m, v] = [given(2048, 7168), made(moments, 2048, 7168), made(moments, 2048, 7168)]
        adamwStep(p, g, m, v, given(), { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weightDecay: 0.1, step: 1 })
      }
      quantize(g)
    },
  }
  for (const [E, groups, topK] of [
    [64, 1, 6],
    [256, 8, 8],
    [384, 1, 8],
  ] as const) {
    all[`router of ${E}`] = () => {
      const logits = learned(4096, E)
      const options = { scoring: 'sigmoid', groups, groupScore: 'top2' } as const
      back(
        routerTopk(logits, given(E), {
          ...options,
          topGroups: Math.ceil(groups / 2),
          topK,
          normalize: true,
          scale: 2.5,
        }).weights,
        [logits],
      )
    }
  }
  for (const [m, n, k] of [
    [4096, 1536, 7168],
    [4096, 24576, 1536],
    [4096, 576, 7168],
    [100, 60, 36],
    [1, 7168, 2048],
    [70, 70, 9000],
  ])
    all[`product ${m} x ${n} x ${k}`] = product(m, n, k)
  for (const [dk, dv] of [
    [64, 64],
    [128, 128],
    [192, 128],
    [256, 256],
  ]) {
    all[`heads of ${dk} and ${dv}`] = heads(1024, 1024, 8, 8, dk, dv)
    all[`heads of ${dk} and ${dv}, texts`] = heads(300, 300, 4, 2, dk, dv, true)
  }
  for (const dtype of ['f32', 'bf16'] as const) {
    for (const [C, V] of [
      [576, 512],
      [288, 256],
      [160, 128],
    ]) {
      all[`decode ${C}, ${dtype}`] = decode(128, C, V, dtype)
      all[`decode ${C}, ${dtype}, in pages`] = decode(16, C, V, dtype, 64)
    }
  }
  all['experts, large'] = experts(4096, 2048, 1024, 8, 4)
  all['experts, small'] = experts(40, 136, 72, 4, 2)
  for (const format of ['bf16', 'fp8', 'int8', 'int4'] as const) {
    for (const rows of [1, 8, 600]) all[`stored ${format}, ${rows} rows`] = stored(format, rows, 1024, 2048)
    all[`stored ${format}, odd`] = stored(format, 3, 130, 129)
  }
  for (const heads of [64, 32, 5]) {
    all[`index scores of ${heads} heads`] = () => {
      indexScores(given(1, 300, heads, 128), given(1, 300, heads), given(1, 900, 128), { limits: ints(1, 300) })
    }
  }
  all['loss'] = entropy(4096, 16384, 2048)
  all['loss, odd'] = entropy(50, 1003, 129)
  return all
}

/** Ops along an axis that is longer than a grid may be along y or z (65,535 blocks), by what makes it so long. All other sizes are as small as possible. */
function longAxes(backend: Backend): Record<string, () => unknown> {
  const made = (dtype: DType, ...shape: number[]) => full(shape, 0, { dtype, backend })
  const learned = (...shape: number[]) => {
    const tensor = made('f32', ...shape)
    tensor.tracked = true
    return tensor
  }
  const back = (loss: Tensor, of: readonly Tensor[]) => {
    for (const gradient of gradients(loss.sum(), of)) gradient?.dispose()
  }
  const heads = (B: number, H: number, G: number) => () => {
    const of = [learned(B, 1, H, 8), learned(B, 2, G, 8), learned(B, 2, G, 8)]
    back(attention(of[0], of[1], of[2]), of)
  }
  const decode = (B: number, T: number, C: number, dtype: DType) => () =>
    latentAttention(made('f32', B, T, 1, C), made(dtype, B, 2, C), made('i32', B), { scale: 1, valueDim: 4 })
  const product = (batch: number, m: number) => () => {
    const [x, w] = [learned(batch, m, 4), learned(batch, 4, 4)]
    back(x.matmul(w, { transposeB: true }), [x, w])
  }
  const most = 65_535
  return {
    'attention of sequences': heads(most + 1, 1, 1),
    'attention of heads': heads(1, most + 1, most + 1),
    'attention of heads with common keys': heads(1, most + 1, 2),
    'decoding of sequences': decode(most + 1, 1, 8, 'bf16'),
    // A tile has 16 rows in f32, and up to 64 in bf16.
    'decoding of rows': decode(1, 64 * most + 1, 8, 'bf16'),
    'decoding of rows, f32': decode(1, 64 * most + 1, 4, 'f32'),
    'products of few rows': product(most + 1, 1),
    'products of matrices': product(most + 1, 9),
    // The gradient of the weight rounds both operands in tiles of 128 rows.
    'products of rows': () => {
      const [x, w] = [learned(128 * most + 1, 1), learned(1, 1)]
      back(x.matmul(w), [x, w])
    },
    'rows of experts': () => {
      const [x, w] = [learned(128 * most + 1, 1), learned(1, 1, 1)]
      back(groupedMatmul(x, w, made('i32', 2)), [x, w])
    },
    // A block computes 1024 elements of a position.
    'rope of features': () => rope(made('f32', 1, 1, 512 * most + 1, 2), made('f32', 1, 1), made('f32', 1, 1)),
  }
}

// The number of multiprocessors of an H100, for which tiles are chosen.
process.env['MOE_CUDA_MULTIPROCESSORS'] ??= '132'

describe.skipIf(unavailable || onDevice)('launches', () => {
  const set = unavailable ? () => {} : emulatorFunction('void moe_emulator_set(const char* name, int value)')
  const launched = new Set<string>()
  let sharedLimit = 0
  const { kernel } = Modules.prototype
  Modules.prototype.kernel = function (module, name, signature, launch) {
    const used = reported.find(kernel => kernel.name === name)?.staticShared ?? Number.NaN
    return kernel.call(this, module, name, signature, one => {
      launched.add(name)
      expect(used + one.shared, name).toBeLessThanOrEqual(sharedLimit)
      launch(one)
    })
  }
  afterAll(() => {
    Modules.prototype.kernel = kernel
    set('idle', 0)
    set('checks', 1)
    resetEmulator()
  })

  test('of every kernel fit the registers and static shared memory of a multiprocessor', () => {
    const bounds = new Map(
      (emulatorFunction('const char* moe_emulator_kernels()')() as string)
        .split('\n')
        .map(line => line.split(' '))
        .map(([, name, threads]) => [name, Number(threads)] as const),
    )
    expect(reported.length).toBeGreaterThan(200)
    for (const { name, registers, staticShared } of reported) {
      const warps = Math.ceil((bounds.get(name) ?? Number.NaN) / 32)
      for (const count of registers)
        if (count !== undefined)
          expect(Math.ceil(warps / 4) * 4 * Math.ceil((count * 32) / 256) * 256, name).toBeLessThanOrEqual(
            mostRegisters,
          )
      expect(staticShared, name).toBeLessThanOrEqual(48 * 1024)
    }
  })

  for (const capability of architectures) {
    for (const wgmma of capability === 90 ? [false, true] : [false]) {
      test(`are valid on compute capability ${capability / 10}${wgmma ? ', wgmma' : ''}`, async () => {
        resetEmulator()
        set('checks', 0)
        set('idle', 1)
        set('capability', capability)
        sharedLimit = (sharedMemory.get(capability) ?? 0) * 1024
        const backend = await createBackend({ ...emulator, wgmma })
        for (const [name, op] of Object.entries({ ...ops(backend), ...longAxes(backend) })) {
          for (const precision of ['f32', 'bf16', 'fp8'] as const) {
            try {
              withPrecision(precision, () => scope(() => void op()))
            } catch (cause) {
              throw new Error(`${name}, ${precision}`, { cause })
            }
          }
        }
        await backend.sync()
        backend.dispose()
      })
    }
  }

  test('a grid that no device accepts is an error that names the kernel, the grid and the limits', async () => {
    const backend = await createBackend(emulator)
    const rows = (...shape: number[]) => full(shape, 0, { backend })
    const weights = rows(65_536, 1, 1)
    weights.tracked = true
    const offsets = full([65_537], 0, { dtype: 'i32', backend })
    expect(() => scope(() => void gradients(groupedMatmul(rows(1, 1), weights, offsets).sum(), [weights]))).toThrow(
      expect.objectContaining({
        code: 'E_UNSUPPORTED',
        message: expect.stringMatching(/^moe_grouped_matmul_bwd_\w+: .* 1 x 65536 x 1 blocks, .* 65535; split them /),
      }),
    )
    backend.dispose()
  })

  test('cover nearly all large kernels', () => {
    const large = reported.filter(({ name }) => /attention|matmul|experts|entropy|router|norm|softmax/.test(name))
    const never = large.filter(({ name }) => !launched.has(name))
    expect(never.length, never.map(({ name }) => name).join(' ')).toBeLessThan(large.length / 8)
  })
})
