/** @file For tests: compares ops with the CPU kernels, at sizes that the backend suite does not cover. */
import type { FusedAttrs, HostArray, OpName, PrimitiveAttrs, Random, Shape, TensorSpec } from '@moe/core'
import { type HostInput, runOp } from '@moe/core/testing'
import { createBackend } from '@moe/kernels-cpu'
import type { CudaOptions } from './open.ts'
import { testBackend } from './test-backend.ts'

const bits = new Float32Array(1)
const word = new Uint32Array(bits.buffer)

/** Returns random numbers that bf16 represents exactly, so that bf16 and f32 products only differ in the order of summation. */
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

/** Returns the outputs of the op on the device. */
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

/** Returns the outputs of the op in f32 on the CPU. */
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

/** The largest difference of two results, relative to the largest element of the second. */
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

/**
 * Throws unless every element's error is below `tolerance` times the largest expected element. The error lists where wrong elements are, by tile, warp and lane.
 * @param absolute absolute error that is always allowed
 */
export function assertNear(
  label: string,
  actual: HostArray,
  expected: HostArray,
  tolerance: number,
  shape: Shape,
  absolute = 0,
): void {
  // Also fails on NaN.
  if (distance(actual, expected) < tolerance) return
  let largest = 1e-6
  for (let i = 0; i < expected.length; i++) largest = Math.max(largest, Math.abs(Number(expected[i])) || 0)
  const allowed = Math.max(tolerance * largest, absolute)
  const columns = shape.at(-1) ?? 1
  const [rowsOf, columnsOf]: Set<number>[] = [new Set(), new Set()]
  const first: string[] = []
  let count = 0
  for (let i = 0; i < expected.length; i++) {
    const [a, e] = [Number(actual[i]), Number(expected[i])]
    if (Object.is(a, e) || Math.abs(a - e) < allowed) continue
    const [row, column] = [Math.floor(i / columns), i % columns]
    count++
    rowsOf.add(row)
    columnsOf.add(column)
    if (first.length < 6) first.push(`  row ${row}, column ${column}: ${a}, expected ${e}`)
  }
  if (count === 0) return
  throw new Error(
    `${label}: ${count} of ${expected.length} elements of [${shape}] are further off than ${allowed.toPrecision(3)}\n${first.join('\n')}
  rows ${describeIndices(rowsOf)}\n  columns ${describeIndices(columnsOf)}`,
  )
}

/** Describes a set of indices: its range, and its lanes and pieces of a tile. */
function describeIndices(found: ReadonlySet<number>): string {
  const all = [...found].sort((a, b) => a - b)
  const modulo = (n: number) => {
    const rest = new Set(all.map(x => x % n))
    return rest.size === n || rest.size > 8 ? `${rest.size} of ${n}` : [...rest].sort((a, b) => a - b).join(' ')
  }
  const ends = `${all[0]} to ${all.at(-1)}, ${all.length} of them`
  return `${ends}; modulo 8: ${modulo(8)}; modulo 64: ${modulo(64)}; tiles of 64: ${new Set(all.map(x => x >> 6)).size}`
}

/** Compares all outputs of the op with those of the CPU. @throws as `assertNear` */
export async function assertNearCpu<O extends OpName>(
  op: O,
  inputs: readonly HostInput[],
  attrs: Attrs<O>,
  outputs: readonly TensorSpec[],
  tolerance: number,
  options: CudaOptions = {},
): Promise<void> {
  const actual = await onCuda(op, inputs, attrs, outputs, options)
  const expected = await onCpu(op, inputs, attrs, outputs)
  actual.forEach((x, i) => {
    assertNear(`${op} ${JSON.stringify(attrs)}, output ${i}`, x, expected[i], tolerance, outputs[i].shape)
  })
}
