/** @file Routed experts, in bf16 here: all rows between the products are bf16, and no expert's output is saved. */
import type { Precision } from '@moe/core'
import type { Matrix } from '../../matrix.ts'
import { type Cuda, type FusedFactory, pointerOf } from '../../native.ts'
import { isFew } from '../grouped-matmul/grouped-matmul.ts'
import { paddedColumns, roundToBf16, wholeMatrix } from '../matmul/operands.ts'
import { rowSlices } from '../permute-tokens/row-slices.ts'
import { fp8Experts } from './fp8.ts'
import { expertProducts, hopperExpertProducts } from './products.ts'
import { combineOf, type ExpertSizes, gatherOf, rowKernel, scratchRows, sizesOf } from './rows.ts'

/** Declined cases, computed op by op: f32, empty inputs, and in bf16 so few rows that rounding the weights would take longer than the products. */
function isDeclined({ M, D, I, E }: ExpertSizes, precision: Precision): boolean {
  const few = D % 4 === 0 && I % 4 === 0 && isFew(M, E)
  return precision === 'f32' || M * D * I * E === 0 || (precision === 'bf16' && few)
}

const productsOf = (cuda: Cuda) => (cuda.onHopper('routed-experts') ? hopperExpertProducts(cuda) : expertProducts(cuda))

export const routedExperts: FusedFactory<'routedExperts'> = cuda => {
  const round = roundToBf16(cuda)
  const products = productsOf(cuda)
  const gather = gatherOf(cuda)
  const combine = combineOf(cuda)
  const inFp8 = fp8Experts(cuda)
  return (inputs, { precision, saves }, specs) => {
    const sizes = sizesOf(inputs)
    if (isDeclined(sizes, precision)) return undefined
    const { N, D, E, I, K, M } = sizes
    const [x, gate, up, down, weights, order, positions] = inputs
    const offsets = pointerOf(inputs[7])
    const outputs = specs.map(spec => cuda.output(spec))
    if (precision === 'fp8') {
      inFp8.forward(
        inputs,
        outputs.map(({ pointer }) => pointer),
      )
      return outputs
    }
    const out = outputs[0].pointer
    const saved = saves ? ([outputs[1].pointer, outputs[2].pointer] as const) : null
    const [tokens, gateWeight, upWeight, downWeight]: Matrix[] = round([
      wholeMatrix(x, N, D),
      wholeMatrix(gate, E * I, D),
      wholeMatrix(up, E * I, D),
      wholeMatrix(down, E * D, I),
    ])
    // The experts' inputs, later overwritten by their outputs.
    const rows = scratchRows(cuda, M, D)
    const inner = scratchRows(cuda, M, I)
    gather(rowSlices(M, rows.ld), rows.pointer, tokens.pointer, pointerOf(order), M, K, N, rows.ld)
    const gated = { inner, saved, x: rows, gate: gateWeight, up: upWeight }
    products.gated(gated, offsets, { rows: M, n: I, k: D, experts: E })
    products.forward(rows, [inner, downWeight], offsets, { rows: M, n: D, k: I, experts: E })
    const gates = [pointerOf(weights), pointerOf(positions)]
    combine(rowSlices(N, D), out, rows.pointer, ...gates, N, K, M, D, rows.ld)
    return outputs
  }
}

export const routedExpertsBackward: FusedFactory<'routedExpertsBackward'> = cuda => {
  const round = roundToBf16(cuda)
  const products = productsOf(cuda)
  const gather = gatherOf(cuda)
  const swiglu = rowKernel(cuda, 'swiglu_bwd', 'p p p p p p p p p p l i i i')
  const combine = combineOf(cuda)
  const inFp8 = fp8Experts(cuda)
  return (inputs, { precision, needs }, specs) => {
    const sizes = sizesOf(inputs)
    if (isDeclined(sizes, precision)) return undefined
    const { N, D, E, I, K, M } = sizes
    const [x, gate, up, down, weights, order, positions, , gateRows, upRows, dout] = inputs
    const offsets = pointerOf(inputs[7])
    const outputs = specs.map(spec => cuda.output(spec))
    let next = 0
    const gradients = needs.map(needed => (needed ? outputs[next++].pointer : 0))
    if (precision === 'fp8') {
      inFp8.backward(inputs, gradients)
      return outputs
    }
    const [dx, dgate, dup, ddown, dweights] = gradients
    const back = { rows: M, n: I, k: D, experts: E }
    const toFeatures = { rows: M, n: D, k: I, experts: E }

    const layout = products.layout(pointerOf(order), pointerOf(positions), offsets, dweights, back)
    const toExperts = (of: Matrix): Matrix => {
      const to = scratchRows(cuda, layout.rows, D)
      gather(rowSlices(layout.rows, to.ld), to.pointer, of.pointer, layout.slots, layout.rows, K, N, to.ld)
      return to
    }
    const innerRows = (isNeeded: boolean | number): Matrix =>
      isNeeded ? scratchRows(cuda, layout.rows, I) : { pointer: 0, ld: paddedColumns(I) }
    const [doutTokens, downWeight] = round([wholeMatrix(dout, N, D), wholeMatrix(down, E * D, I)])
    const doutRows = toExperts(doutTokens)
    // The gradient of down's input is written to gate's buffer, until SwiGLU's gradient overwrites it.
    const dgateRows = innerRows(true)
    const dupRows = innerRows(dx || dup)
    const weighted = innerRows(ddown)
    products.backward(dgateRows, [[doutRows, downWeight]], offsets, back)
    swiglu(
      { grid: Math.ceil(layout.rows / 8), block: 256 },
      dx || dgate ? dgateRows.pointer : 0,
      dupRows.pointer,
      weighted.pointer,
      dweights,
      dgateRows.pointer,
      ...[gateRows, upRows, weights].map(pointerOf),
      layout.slots,
      pointerOf(positions),
      layout.rows,
      M,
      I,
      dgateRows.ld,
    )
    if (ddown) products.weightGradient(ddown, doutRows, weighted, offsets, toFeatures)
    if (dgate || dup) {
      const xRows = toExperts(round([wholeMatrix(x, N, D)])[0])
      if (dgate) products.weightGradient(dgate, dgateRows, xRows, offsets, back)
      if (dup) products.weightGradient(dup, dupRows, xRows, offsets, back)
    }
    if (dx) {
      const [gateWeight, upWeight] = round([wholeMatrix(gate, E * I, D), wholeMatrix(up, E * I, D)])
      // The rows of dout are no longer needed.
      products.backward(
        doutRows,
        [
          [dgateRows, gateWeight],
          [dupRows, upWeight],
        ],
        offsets,
        toFeatures,
      )
      combine(rowSlices(N, D), dx, doutRows.pointer, 0, layout.places, N, K, layout.rows, D, doutRows.ld)
    }
    return outputs
  }
}
