/** @file Every op that has a native kernel. One line each. */
import type { FusedName, PrimitiveName } from '@moe/core'
import type { FusedFactory, PrimitiveFactory } from '../native.ts'
import { crossEntropy, crossEntropyBackward } from './cross-entropy/cross-entropy.ts'
import { groupedMatmul, groupedMatmulWeightGrad } from './grouped-matmul/grouped-matmul.ts'
import { linearCrossEntropy, linearCrossEntropyBackward } from './linear-cross-entropy/linear-cross-entropy.ts'
import { matmul } from './matmul/matmul.ts'
import { unary } from './unary/unary.ts'

export const primitiveFactories: { readonly [P in PrimitiveName]: PrimitiveFactory<P> } = {
  matmul,
  unary,
}

export const fusedFactories: { readonly [F in FusedName]?: FusedFactory<F> } = {
  crossEntropy,
  crossEntropyBackward,
  groupedMatmul,
  groupedMatmulWeightGrad,
  linearCrossEntropy,
  linearCrossEntropyBackward,
}
