/** @file One step of an exponential moving average of one tensor. */
import type { EmaAttrs } from '../backend.ts'
import { noGrad } from '../context.ts'
import { needDtype, needShape } from '../infer.ts'
import { type FusedDefinition, runFused, type Tensor } from '../tensor.ts'

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
 * An exponential moving average of a tensor that is replaced step by step, with the new value in it. It is an average of values 1 .. step alone, of which each weighs `decay` times the next one,
 * whatever `average` holds before the first (finite numbers). `average` is used up: assign the result in its place.
 */
export function emaStep(average: Tensor, value: Tensor, attrs: EmaAttrs): Tensor {
  return noGrad(() => runFused(emaStepDefinition, [average, value], attrs)[0])
}
