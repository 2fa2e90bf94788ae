/** @file Error bounds of fp8 products on tensor cores that keep only a few bits of a sum. */
import type { Backend, FusedKernels, PrimitiveKernels } from '../backend.ts'
import { fp8Tile } from '../dtype.ts'
import { groupedMatmulDefinition } from '../fused/grouped-matmul.ts'
import { readF64, referenceBackend, roundOperand } from '../reference/index.ts'
import { scope } from '../scope.ts'
import { sizeOf } from '../shape.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'

/** Number of products that are added to a sum at once. */
const productsPerStep = 32

/** Returns the value of the last of `bits` bits of a number of that size. */
const lastBit = (size: number, bits: number) => 2 ** (Math.floor(Math.log2(size)) + 1 - bits)

/**
 * Returns a reference backend on which an fp8 product returns, for each element, its maximum error on tensor cores that
 * keep `bits` bits of a sum (14 on Hopper; DeepSeek-V3 report 3.3.2).
 *
 * Such a core adds 32 products to a sum at once: it aligns all of them to the largest, truncates bits below its
 * precision, and truncates the result. Each tile of 128 has its own sum, and the sums of tiles are added in f32.
 * Products of two f8e4m3 numbers have at most eight bits, so only small products next to a large one lose bits.
 */
export function fp8ErrorBounds(bits: number): Backend {
  const reference = referenceBackend()
  const matmul: PrimitiveKernels['matmul'] = (inputs, attrs, outputs) => {
    const [a, b] = inputs
    const [{ shape }] = outputs
    const { transposeA, transposeB, precision } = attrs
    if (precision !== 'fp8' || shape.length !== 2) return reference.primitives.matmul(inputs, attrs, outputs)
    const [m, n] = shape
    const k = a.shape[transposeA ? 0 : 1]
    const rows = { outer: m, k, stepOuter: transposeA ? 1 : k, stepK: transposeA ? m : 1 }
    const columns = { outer: n, k, stepOuter: transposeB ? k : 1, stepK: transposeB ? 1 : n }
    const x = roundOperand(readF64(a) as Float64Array, rows)
    const y = roundOperand(readF64(b) as Float64Array, columns)
    const bounds = new Float32Array(sizeOf(shape))
    const products = new Float64Array(productsPerStep)
    for (let i = 0; i < m; i++) {
      for (let j = 0; j < n; j++) {
        for (let first = 0; first < k; first += fp8Tile) {
          const end = Math.min(k, first + fp8Tile)
          let [sum, error] = [0, 0]
          for (let from = first; from < end; from += productsPerStep) {
            const count = Math.min(productsPerStep, end - from)
            let [total, largest] = [sum, Math.abs(sum) + error]
            for (let t = 0; t < count; t++) {
              const at = from + t
              const product = x[i * rows.stepOuter + at * rows.stepK] * y[j * columns.stepOuter + at * columns.stepK]
              products[t] = Math.abs(product)
              largest = Math.max(largest, products[t])
              total += product
            }
            if (largest === 0) continue
            const bit = lastBit(largest, bits)
            if (sum !== 0) error += bit
            // The remainder by a power of two, exactly; % takes most of the time of a suite.
            for (let t = 0; t < count; t++) error += products[t] - Math.floor(products[t] / bit) * bit
            sum = total
            if (Math.abs(sum) + error > 0) error += lastBit(Math.abs(sum) + error, bits)
          }
          bounds[i * n + j] += error
        }
      }
    }
    return [reference.upload(bounds, shape, 'f32')]
  }
  // One op, so that its gradient is that of experts, whose tiles start at their first row.
  const groupedMatmul: FusedKernels['groupedMatmul'] = (inputs, attrs, outputs) =>
    scope(() => {
      const parts = noGrad(() => groupedMatmulDefinition.decompose(inputs as readonly Tensor[], attrs))
      return reference.primitives.reshape(parts, {}, outputs)
    })
  return { ...reference, primitives: { ...reference.primitives, matmul }, fused: { groupedMatmul } }
}
