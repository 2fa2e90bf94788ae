/** @file Central differences in f64 on the reference backend: the ground truth of gradients. */
import { readF64 } from '../reference/index.ts'
import type { Tensor } from '../tensor.ts'

/**
 * Returns d loss / d input for each element. `loss` is called twice per element and must return a number computed on
 * the reference backend; `input` must be on that backend too, and is restored afterwards.
 */
export function finiteDifference(input: Tensor, loss: () => number, step = 1e-5): Float64Array {
  const data = readF64(input)
  return Float64Array.from(data, (value, i) => {
    data[i] = value + step
    const up = loss()
    data[i] = value - step
    const down = loss()
    data[i] = value
    return (up - down) / (2 * step)
  })
}
