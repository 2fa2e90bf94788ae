/** @file A reference backend with random rounding errors, which shows how much the results of a program depend on them. */
import type { Backend, Kernel, PrimitiveKernels } from '../../backend.ts'
import type { PrimitiveName } from '../../ops.ts'
import { Random } from '../../random.ts'
import { readF64, referenceBackend } from '../../reference/index.ts'

/** Ops that round their results. All others only move, compare or select numbers. */
const rounding = new Set<PrimitiveName>(['unary', 'binary', 'reduce', 'cumsum', 'matmul', 'scatterAddRows'])
/** Codes of these ops that are exact. */
const exact: ReadonlySet<unknown> = new Set(['max', 'min', 'neg', 'abs', 'sign', 'floor'])

/** Creates a reference backend that multiplies all inputs and results by a random number within `size` of 1. */
export function withRoundingErrors(size: number, seed: number): Backend {
  const base = referenceBackend()
  const random = new Random(seed)
  const disturb = (value: Parameters<typeof readF64>[0]) => {
    if (value.dtype === 'f32') {
      const data = readF64(value)
      const errors = random.uniform(data.length)
      for (let i = 0; i < data.length; i++) data[i] *= 1 + size * (2 * errors[i] - 1)
    }
    return value.handle
  }
  const disturbed = (kernel: Kernel<unknown>): Kernel<unknown> => {
    return (inputs, attrs, outputs) => {
      const handles = kernel(inputs, attrs, outputs)
      if (exact.has((attrs as { code?: unknown }).code)) return handles
      return handles.map((handle, i) => disturb({ ...outputs[i], handle }))
    }
  }
  const primitives = Object.fromEntries(
    Object.entries(base.primitives).map(([name, kernel]) => [
      name,
      rounding.has(name as PrimitiveName) ? disturbed(kernel as Kernel<unknown>) : kernel,
    ]),
  ) as unknown as PrimitiveKernels
  return {
    ...base,
    primitives,
    upload: (data, shape, dtype) => disturb({ handle: base.upload(data, shape, dtype), shape, dtype }),
  }
}
