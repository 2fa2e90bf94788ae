/** @file For tests: the same op here and on the CPU kernels, at sizes that the backend suite does not reach. */
import type { FusedAttrs, HostArray, OpName, PrimitiveAttrs, Random, TensorSpec } from '@moe/core'
import { type HostInput, runOp } from '@moe/core/testing'
import { createBackend } from '@moe/kernels-cpu'
import type { CudaOptions } from './open.ts'
import { testBackend } from './test-backend.ts'

const bits = new Float32Array(1)
const word = new Uint32Array(bits.buffer)

/** Random numbers that bf16 holds exactly: products in bf16 then differ from those in f32 by the order of summation alone. */
export function exact(random: Random, ...shape: number[]): HostInput {
  const data = Float32Array.from(random.normal(shape.reduce((a, b) => a * b, 1)), x => {
    bits[0] = x
    word[0] &= 0xffff0000
    return bits[0]
  })
  return { data, shape }
}

export const integers = (...data: number[]): HostInput => ({ data, shape: [data.length], dtype: 'i32' })
export const output = (...shape: number[]): TensorSpec => ({ shape, dtype: 'f32' })

type Attrs<O extends OpName> = (PrimitiveAttrs & FusedAttrs)[O]

/** Outputs of the op here. */
export async function onCuda<O extends OpName>(
  op: O,
  inputs: readonly HostInput[],
  attrs: Attrs<O>,
  outputs: readonly TensorSpec[],
  options: CudaOptions = {},
) {
  const backend = await testBackend(options)
  const results = await runOp(backend, op, inputs, attrs, outputs)
  await backend.sync()
  backend.dispose()
  return results
}

/** Outputs of the op in f32 on the CPU. */
export async function onCpu<O extends OpName>(
  op: O,
  inputs: readonly HostInput[],
  attrs: Attrs<O>,
  outputs: readonly TensorSpec[],
) {
  const backend = await createBackend()
  const f32 = 'precision' in (attrs as object) ? { ...attrs, precision: 'f32' } : attrs
  const results = await runOp(backend, op, inputs, f32 as Attrs<O>, outputs)
  backend.dispose()
  return results
}

/** Largest difference of two results over the largest element of the second. */
export function distance(a: HostArray, b: HostArray): number {
  let worst = 0
  let largest = 1e-6
  for (let i = 0; i < b.length; i++) {
    if (Object.is(a[i], b[i])) continue
    const difference = Math.abs(Number(a[i]) - Number(b[i]))
    worst = Number.isNaN(difference) ? Number.POSITIVE_INFINITY : Math.max(worst, difference)
    largest = Math.max(largest, Math.abs(Number(b[i])))
  }
  return worst / largest
}

/** The largest distance of all outputs between here and the CPU. */
export async function distanceToCpu<O extends OpName>(
  op: O,
  inputs: readonly HostInput[],
  attrs: Attrs<O>,
  outputs: readonly TensorSpec[],
  options: CudaOptions = {},
) {
  const here = await onCuda(op, inputs, attrs, outputs, options)
  const there = await onCpu(op, inputs, attrs, outputs)
  return Math.max(...here.map((x, i) => distance(x, there[i])))
}
