/** @file Every op that has a native kernel. One line each. */
import type { FusedName, PrimitiveName } from '@moe/core'
import type { FusedFactory, PrimitiveFactory } from '../native.ts'
import { attention, attentionBackward } from './attention/attention.ts'
import { binary } from './binary/binary.ts'
import { cast } from './cast/cast.ts'
import { compare } from './compare/compare.ts'
import { crossEntropy, crossEntropyBackward } from './cross-entropy/cross-entropy.ts'
import { cumsum } from './cumsum/cumsum.ts'
import { fill } from './fill/fill.ts'
import { groupedMatmul, groupedMatmulWeightGrad } from './grouped-matmul/grouped-matmul.ts'
import { latentAttention } from './latent-attention/latent-attention.ts'
import { linearCrossEntropy, linearCrossEntropyBackward } from './linear-cross-entropy/linear-cross-entropy.ts'
import { matmul } from './matmul/matmul.ts'
import { concat, expand, pad, permute, reshape, slice } from './movement/movement.ts'
import { reduce } from './reduce/reduce.ts'
import { scatterAddRows, setRows, takeRows } from './rows/rows.ts'
import { topk } from './topk/topk.ts'
import { unary } from './unary/unary.ts'
import { where } from './where/where.ts'

export const primitiveFactories: { readonly [P in PrimitiveName]: PrimitiveFactory<P> } = {
  binary,
  cast,
  compare,
  concat,
  cumsum,
  expand,
  fill,
  matmul,
  pad,
  permute,
  reduce,
  reshape,
  scatterAddRows,
  setRows,
  slice,
  takeRows,
  topk,
  unary,
  where,
}

export const fusedFactories: { readonly [F in FusedName]?: FusedFactory<F> } = {
  attention,
  attentionBackward,
  crossEntropy,
  crossEntropyBackward,
  groupedMatmul,
  groupedMatmulWeightGrad,
  latentAttention,
  linearCrossEntropy,
  linearCrossEntropyBackward,
}
