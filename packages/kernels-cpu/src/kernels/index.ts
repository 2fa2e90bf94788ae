/** @file Every op that has a native kernel. One line each. */
import type { FusedName, PrimitiveName } from '@moe/core'
import type { FusedFactory, PrimitiveFactory } from '../native.ts'
import { unary } from './unary/unary.ts'

export const primitiveFactories: { readonly [P in PrimitiveName]: PrimitiveFactory<P> } = {
  unary,
}

export const fusedFactories: { readonly [F in FusedName]?: FusedFactory<F> } = {}
