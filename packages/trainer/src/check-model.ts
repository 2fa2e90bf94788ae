/** @file A model is a user's code: what it is asked for is checked when it comes. */
import { MoeError } from '@moe/core'
import type { LossOutput, TrainableModel } from './model.ts'

/** @throws MoeError E_ATTR */
export function checkModel(op: string, model: TrainableModel): void {
  if (typeof model?.loss === 'function') return
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: model ? 'the model has no method loss' : `the model is ${model}`,
    fix: 'pass a Module with lookahead and loss, such as a DeepSeek; the README of @moe/trainer has one of your own',
  })
}

/** What `loss` returned, if it is what it has to be. @throws MoeError E_ATTR */
export function checkedLoss(output: LossOutput): LossOutput {
  const problem = faultOf(output)
  if (problem === undefined) return output
  const given: unknown = output
  const late = given instanceof Promise
  // What it made is freed under it, and nobody waits for how it fails.
  if (late) given.catch(() => undefined)
  const fix = late
    ? 'make it synchronous: tensors are read after the step'
    : 'return { loss, nll, count, metrics }: two tensors of one number, the number of counted positions, tensors to log by name (or {})'
  throw new MoeError({ code: 'E_ATTR', op: 'loss', problem: `the model returned ${problem}`, fix })
}

function faultOf(output: Partial<LossOutput> | null | undefined): string | undefined {
  if (output instanceof Promise) return 'a promise'
  if (typeof output !== 'object' || output === null) return `${output}`
  if ('backend' in output) return 'a tensor alone'
  const { loss, nll, count, metrics } = output
  if (typeof count !== 'number') return `count = ${count}`
  if (typeof metrics !== 'object' || metrics === null) return `metrics = ${metrics}`
  for (const [name, value] of Object.entries({ loss, nll, ...metrics })) {
    if (value?.backend === undefined) return `${name} = ${value}, no tensor`
    if (value.size !== 1) return `${name} of shape [${value.shape}]`
  }
  return undefined
}
