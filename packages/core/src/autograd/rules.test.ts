import { expect, expectTypeOf, test } from 'vitest'
import type { FusedDefinition } from '../fused/definition.ts'
import { fusedDefinitions } from '../fused/index.ts'
import type { FusedName, OpAttrs, PrimitiveName } from '../ops.ts'
import { referencePrimitives } from '../reference/primitives.ts'
import type { Vjp } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { rules } from './rules.ts'

// The assertions on types are checked by the compiler (pnpm typecheck): an unused @ts-expect-error is an error.

test('the table of rules contains exactly the primitives, and does not compile without one', () => {
  expect(Object.keys(rules).toSorted()).toEqual(Object.keys(referencePrimitives).toSorted())
  expectTypeOf<keyof typeof rules>().toEqualTypeOf<PrimitiveName>()
  type Rules = { readonly [P in PrimitiveName]: Vjp<Tensor, OpAttrs[P]> }
  const { matmul: _, ...rest } = rules
  // @ts-expect-error: the rule of matmul is missing
  const incomplete: Rules = rest
  expect(incomplete).toBeDefined()
})

test('a rule gets the attributes of its own op', () => {
  expectTypeOf<Parameters<(typeof rules)['cumsum']>[0]['attrs']>().toEqualTypeOf<{ readonly axis: number }>()
  // @ts-expect-error: cumsum has an axis, no axes
  const wrong: Vjp<Tensor, OpAttrs['cumsum']> = ({ attrs }) => [attrs.axes]
  expect(wrong).toBeDefined()
})

test('the table of fused ops contains every definition under its own name', () => {
  for (const [name, definition] of Object.entries(fusedDefinitions)) expect(definition.name).toBe(name)
  expectTypeOf<keyof typeof fusedDefinitions>().toEqualTypeOf<FusedName>()
  // @ts-expect-error: a definition without a decomposition
  const incomplete: FusedDefinition<'softmax'> = { name: 'softmax', infer: ([x]) => [x], vjp: null }
  expect(incomplete).toBeDefined()
})
