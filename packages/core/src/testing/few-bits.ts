/** @file How far off a product in fp8 may be where tensor cores keep few bits of a sum. */
import type { Backend, FusedKernels, PrimitiveKernels } from '../backend.ts'
import { noGrad } from '../context.ts'
import { fp8Tile } from '../dtype.ts'
import { groupedMatmulDefinition } from '../fused/grouped-matmul.ts'
import { readF64, referenceBackend, roundOperand } from '../reference/index.ts'
import { scope } from '../scope.ts'
import { sizeOf } from '../shape.ts'
import type { Tensor } from '../tensor.ts'

/** Products that are added to a sum at once. */
const together = 32

/** What the last of `bits` bits of a number of that size is worth. */
const lastBit = (size: number, bits: number) => 2 ** (Math.floor(Math.log2(size)) + 1 - bits)

/**
 * A reference backend on which a product in fp8 is not the product, but the most that each of its elements may be off by on tensor cores that keep `bits` bits of a sum (Hopper's: 14;
 * DeepSeek-V3 report 3.3.2). These add 32 products to a sum at once: all are shifted to where the largest of them begins, what lies behind its bits is cut off, and so is
 * what comes out. Each tile of 128 has a sum of its own, and the sums of tiles are added in f32. Products of f8e4m3 have eight bits at most, so that only small ones beside a large one lose any.
 */
export function lossesInFewBits(bits: number): Backend {
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
    const lost = new Float32Array(sizeOf(shape))
    const products = new Float64Array(together)
    for (let i = 0; i < m; i++) {
      for (let j = 0; j < n; j++) {
        for (let first = 0; first < k; first += fp8Tile) {
          const end = Math.min(k, first + fp8Tile)
          let [sum, off] = [0, 0]
          for (let from = first; from < end; from += together) {
            const count = Math.min(together, end - from)
            let [total, largest] = [sum, Math.abs(sum) + off]
            for (let t = 0; t < count; t++) {
              const at = from + t
              const product = x[i * rows.stepOuter + at * rows.stepK] * y[j * columns.stepOuter + at * columns.stepK]
              products[t] = Math.abs(product)
              largest = Math.max(largest, products[t])
              total += product
            }
            if (largest === 0) continue
            const bit = lastBit(largest, bits)
            if (sum !== 0) off += bit
            for (let t = 0; t < count; t++) off += products[t] % bit
            sum = total
            if (Math.abs(sum) + off > 0) off += lastBit(Math.abs(sum) + off, bits)
          }
          lost[i * n + j] += off
        }
      }
    }
    return [reference.upload(lost, shape, 'f32')]
  }
  // One op, so that its gradient is that of experts, whose tiles begin with their rows.
  const groupedMatmul: FusedKernels['groupedMatmul'] = (inputs, attrs, outputs) =>
    scope(() => {
      const parts = noGrad(() => groupedMatmulDefinition.decompose(inputs as readonly Tensor[], attrs))
      return reference.primitives.reshape(parts, {}, outputs)
    })
  return { ...reference, primitives: { ...reference.primitives, matmul }, fused: { groupedMatmul } }
}
