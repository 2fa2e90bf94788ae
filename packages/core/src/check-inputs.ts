/** @file The checks that every op makes of its inputs: that they are tensors, not freed, and on one backend. */
import type { Backend } from './backend.ts'
import { needAlive, needTensor, type Operand, shapeError } from './checks.ts'
import { MoeError } from './errors.ts'
import type { OpName } from './ops.ts'

/**
 * Checks the inputs of an op and returns their backend.
 * @param code the name that the user called if the op covers several functions, for example `add` for `binary`
 * @throws MoeError E_ATTR, E_DISPOSED, E_BACKEND_MIX
 */
export function checkInputs(op: OpName, inputs: readonly Operand[], code?: string): Backend {
  if (inputs.length === 0) throw shapeError(op, 'the list of tensors is empty', 'pass at least one')
  const backend = inputs[0]?.backend
  for (let i = 0; i < inputs.length; i++) {
    const input = inputs[i]
    if (input?.backend === undefined) needTensor(code ?? op, inputNames[op]?.[i] ?? `input ${i}`, input)
    if (input.handle === null) needAlive(code ?? op, input)
    if (input.backend !== backend) {
      throw new MoeError({
        code: 'E_BACKEND_MIX',
        op: code ?? op,
        problem: `inputs are on different backends, ${backend.name} and ${input.backend.name}`,
        fix: 'copy one with await x.to(backend)',
      })
    }
  }
  return backend
}

/** Names of the inputs in error messages, as in the functions that users call. Ops without an entry number them. */
const inputNames: { readonly [Op in OpName]?: readonly string[] } = {
  where: ['condition', 'a', 'b'],
  takeRows: ['x', 'index'],
  scatterAddRows: ['index', 'source'],
  setRows: ['x', 'index', 'source'],
  softmax: ['x'],
  rmsNorm: ['x', 'weight'],
  swiglu: ['gate', 'up'],
  rope: ['x', 'cos', 'sin', 'plain'],
  mlaKeyValue: ['kv', 'ropeKey'],
  attention: ['q', 'k', 'v', 'lengths', 'starts'],
  latentAttention: ['q', 'cache', 'lengths', 'pages'],
  indexScores: ['q', 'weights', 'keys', 'limits'],
  crossEntropy: ['logits', 'targets'],
  linearCrossEntropy: ['x', 'weight', 'targets'],
  routerTopk: ['logits', 'bias'],
  dispatchPlan: ['indices'],
  permuteTokens: ['x', 'order', 'positions'],
  combineTokens: ['y', 'weights', 'order', 'positions'],
  groupedMatmul: ['x', 'weight', 'offsets'],
  routedExperts: ['x', 'gate', 'up', 'down', 'weights', 'order', 'positions', 'offsets'],
  quantizedMatmul: ['x', 'q', 'scale'],
  quantizedGroupedMatmul: ['x', 'q', 'offsets', 'scale'],
  adamwStep: ['param', 'grad', 'm', 'v', 'gradScale'],
  emaStep: ['average', 'value'],
  quantize: ['x'],
}
