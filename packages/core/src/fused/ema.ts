/** @file One step of an exponential moving average of a tensor. */
import { needDtype, needShape } from '../checks.ts'
import type { EmaAttrs } from '../ops.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { type FusedDefinition, runFused } from './definition.ts'

export const emaStepDefinition: FusedDefinition<'emaStep'> = {
  name: 'emaStep',
  infer([average, value]) {
    needDtype('emaStep', 'average', average, 'f32')
    needDtype('emaStep', 'value', value, 'f32')
    needShape('emaStep', 'value', value, average.shape)
    return [average]
  },
  decompose: ([average, value], { decay, step }) => [
    average.add(value.sub(average).mul((1 - decay) / (1 - decay ** step))),
  ],
  vjp: null,
}

/**
 * Updates an exponential moving average with the tensor's new value. The result is an average over the values 1 to
 * `step` only, in which each value weighs `decay` times the next one: what `average` contains before the first step has
 * no effect, as long as it is finite. `average` is used up: replace it by the result.
 */
export function emaStep(average: Tensor, value: Tensor, attrs: EmaAttrs): Tensor {
  return noGrad(() => runFused(emaStepDefinition, [average, value], attrs)[0])
}
