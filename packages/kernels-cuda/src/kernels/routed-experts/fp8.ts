/** @file Routed experts in precision fp8: products give bf16, and results between them are quantized directly to operands of the next products. */
import { fp8Tile, type Value } from '@moe/core'
import type { Matrix } from '../../matrix.ts'
import type { LaunchShape } from '../../modules.ts'
import { type Cuda, pointerOf } from '../../native.ts'
import { type Fp8Codes, fp8AsCodes, packedRows, scratchCodes } from '../fp8-matmul-sm90a/codes.ts'
import { fp8GroupedRounded, fp8PackedWeightGradient } from '../fp8-matmul-sm90a/product.ts'
import { type Fp8Operand, fp8AsBf16, stripes, tilesOfExperts } from '../fp8-operand/fp8-operand.ts'
import type { Sizes } from '../grouped-matmul-sm90a/product.ts'
import { rowSlices } from '../permute-tokens/row-slices.ts'
import { expertProducts } from './products.ts'
import { combineOf, type ExpertSizes, gatherOf, rowKernel, scratchRows, sizesOf } from './rows.ts'

/** The form in which fp8 products read operands on this device. Rows are in expert order. */
interface Form<Operand> {
  /** A rounded tensor. */
  rounded(of: Fp8Operand): Operand
  /** Memory for rows `[rows, k]`, rounded along rows. */
  along(rows: number, k: number): Operand
  /** Memory for rows `[rows, columns]`, rounded across rows, expert by expert. */
  across(rows: number, columns: number, experts: number): Operand
  /** A kernel that fills `count` operands of the same size, except null ones, from the arguments `rest`. */
  kernel(
    name: string,
    count: number,
    rest: string,
  ): (launch: LaunchShape, to: ReadonlyArray<Operand | null>, ...rest: number[]) => void
  /** The tokens of the rows, from tokens that are rounded along rows. */
  gather(tokens: Operand, order: number, sizes: ExpertSizes): Operand
  /** y `[rows, n]` in bf16 = x `[rows, k]` times the weight `[experts, n, k]` of each row's expert, transposed. */
  forward(y: Matrix, x: Operand, weight: Operand, offsets: number, sizes: Sizes): void
  /** The same for weights `[experts, k, n]` that are rounded across rows; the products of up to two pairs are added. */
  backward(y: Matrix, pairs: ReadonlyArray<readonly [x: Operand, weight: Operand]>, offsets: number, sizes: Sizes): void
  /** dweight `[experts, n, k]` = dy^T x over the rows of each expert. */
  weightGradient(dweight: number, dy: Operand, x: Operand, offsets: number, sizes: Sizes): void
}

/** Form without Hopper's instructions: the rounded values in bf16, in the same layout. */
function bf16Form(cuda: Cuda): Form<Matrix> {
  const products = expertProducts(cuda)
  const gather = gatherOf(cuda)
  const scratch = (rows: number, columns: number) => scratchRows(cuda, rows, columns)
  return {
    rounded: fp8AsBf16(cuda),
    along: scratch,
    across: scratch,
    kernel(name, count, rest) {
      const kernel = rowKernel(cuda, `fp8_${name}`, `${'p '.repeat(count)}i ${rest}`)
      return (launch, to, ...others) => {
        const ld = to.find(rows => rows !== null)?.ld ?? 0
        kernel(launch, ...to.map(rows => rows?.pointer ?? 0), ld, ...others)
      }
    },
    gather(tokens, order, { N, K, M, D }) {
      const to = scratch(M, D)
      gather(rowSlices(M, to.ld), to.pointer, tokens.pointer, order, M, K, N, to.ld)
      return to
    },
    forward: (y, x, weight, offsets, sizes) => products.forward(y, [x, weight], offsets, sizes),
    backward: products.backward,
    weightGradient: products.weightGradient,
  }
}

/** Form for Hopper: fp8 codes. */
function codesForm(cuda: Cuda): Form<Fp8Codes> {
  const load = (name: string, signature: string) =>
    cuda.kernel('routed-experts-sm90a', `moe_routed_experts_fp8_${name}_sm90a`, signature)
  const gather = load('gather', 'p p p p p i i i i i i i')
  const multiply = fp8GroupedRounded(cuda)
  const weightGradient = fp8PackedWeightGradient(cuda)
  return {
    rounded: fp8AsCodes(cuda),
    along: (rows, k) => scratchCodes(cuda, rows, k),
    across: (rows, columns, experts) => scratchCodes(cuda, columns, packedRows(rows, experts)),
    kernel(name, count, rest) {
      const kernel = load(name, `${'p p '.repeat(count)}i i ${rest}`)
      return (launch, to, ...others) => {
        const { ld, ldScales } = to.find(codes => codes !== null) ?? { ld: 0, ldScales: 0 }
        kernel(launch, ...to.flatMap(codes => [codes?.pointer ?? 0, codes?.scales ?? 0]), ld, ldScales, ...others)
      }
    },
    gather({ pointer, scales, ldScales }, order, { N, K, M, D }) {
      const to = scratchCodes(cuda, M, D)
      const strides = [to.ld, to.ldScales, ldScales, Math.ceil(D / fp8Tile)]
      gather({ grid: Math.ceil(M / 8), block: 256 }, to.pointer, to.scales, pointer, scales, order, M, K, N, ...strides)
      return to
    },
    forward: (y, x, weight, offsets) => multiply(y, [[x, weight]], offsets),
    backward: (y, pairs, offsets) => multiply(y, pairs, offsets),
    weightGradient: (dweight, dy, x, offsets, { experts }) => weightGradient(dweight, dy, x, offsets, experts),
  }
}

export interface Fp8Experts {
  /** Addresses of out, and of the results of gate and up if they are saved. */
  forward(inputs: readonly Value[], outputs: readonly number[]): void
  /** Addresses of the gradients; 0 for those that are not needed. */
  backward(inputs: readonly Value[], gradients: readonly number[]): void
}

export const fp8Experts = (cuda: Cuda): Fp8Experts =>
  cuda.onHopper('routed-experts') ? expertsIn(cuda, codesForm(cuda)) : expertsIn(cuda, bf16Form(cuda))

function expertsIn<Operand>(cuda: Cuda, form: Form<Operand>): Fp8Experts {
  const swiglu = form.kernel('swiglu', 1, 'p p i i')
  const swigluAlong = form.kernel('swiglu_bwd_along', 2, 'p p p p p p i i i')
  const swigluAcross = form.kernel('swiglu_bwd_across', 3, 'p p p p p p i i i i')
  const tokensAcross = form.kernel('tokens_across', 1, 'p p p i i i i')
  const combine = combineOf(cuda)
  return {
    forward(inputs, [out, ...saved]) {
      const sizes = sizesOf(inputs)
      const { N, D, E, I, K, M } = sizes
      const [x, gate, up, down] = inputs
      const [weights, order, positions, offsets] = inputs.slice(4).map(pointerOf)
      const weightOf = (value: Value) => form.rounded({ value, along: true, runs: E })
      const rows = form.gather(form.rounded({ value: x, along: true }), order, sizes)
      const [gateRows, upRows] = [gate, up].map((weight, i) => {
        const pointer = saved[i] ?? cuda.scratch(M * I * 2).pointer
        form.forward({ pointer, ld: I }, rows, weightOf(weight), offsets, { rows: M, n: I, k: D, experts: E })
        return pointer
      })
      const inner = form.along(M, I)
      swiglu({ grid: [Math.ceil(M / 8), Math.ceil(I / fp8Tile)], block: 256 }, [inner], gateRows, upRows, M, I)
      const y = scratchRows(cuda, M, D)
      form.forward(y, inner, weightOf(down), offsets, { rows: M, n: D, k: I, experts: E })
      combine(rowSlices(N, D), out, y.pointer, weights, positions, N, K, M, D, y.ld)
    },
    backward(inputs, [dx, dgate, dup, ddown, dweights]) {
      const sizes = sizesOf(inputs)
      const { N, D, E, I, K, M } = sizes
      const [x, gate, up, down] = inputs
      const [weights, order, positions, offsets, gateRows, upRows] = inputs.slice(4, 10).map(pointerOf)
      const dout = inputs[10]
      const back = { rows: M, n: I, k: D, experts: E }
      const toFeatures = { rows: M, n: D, k: I, experts: E }
      const weightOf = (value: Value) => form.rounded({ value, along: false, runs: E })
      const ofExperts = (columns: number) => stripes(columns, tilesOfExperts(M, E))
      const toExperts = (tokens: Value): Operand => {
        const to = form.across(M, D, E)
        tokensAcross(ofExperts(D), [to], pointerOf(tokens), order, offsets, M, D, E, K)
        return to
      }

      const doutRows = form.gather(form.rounded({ value: dout, along: true }), order, sizes)
      // As if every choice had weight 1.
      const dinner = scratchRows(cuda, M, I)
      form.backward(dinner, [[doutRows, weightOf(down)]], offsets, back)
      const rows = [dinner.pointer, gateRows, upRows, weights, order]
      const [dgateAlong, dupAlong] = dx ? [form.along(M, I), form.along(M, I)] : [null, null]
      if (dx || dweights) {
        const launch = { grid: Math.ceil(M / 8), block: 256 }
        swigluAlong(launch, [dgateAlong, dupAlong], dweights, ...rows, M, I, dinner.ld)
      }
      const across = [dgate, dup, ddown].map(isWanted => (isWanted ? form.across(M, I, E) : null))
      const [dgateAcross, dupAcross, weighted] = across
      if (dgate || dup || ddown) swigluAcross(ofExperts(I), across, ...rows, offsets, M, I, dinner.ld, E)
      if (weighted !== null) form.weightGradient(ddown, toExperts(dout), weighted, offsets, toFeatures)
      if (dgateAcross !== null || dupAcross !== null) {
        const xAcross = toExperts(x)
        if (dgateAcross !== null) form.weightGradient(dgate, dgateAcross, xAcross, offsets, back)
        if (dupAcross !== null) form.weightGradient(dup, dupAcross, xAcross, offsets, back)
      }
      if (dgateAlong !== null && dupAlong !== null) {
        const dxRows = scratchRows(cuda, M, D)
        const pairs = [
          [dgateAlong, weightOf(gate)],
          [dupAlong, weightOf(up)],
        ] as const
        form.backward(dxRows, pairs, offsets, toFeatures)
        combine(rowSlices(N, D), dx, dxRows.pointer, 0, positions, N, K, M, D, dxRows.ld)
      }
    },
  }
}
