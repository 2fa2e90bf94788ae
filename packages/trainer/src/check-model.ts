/** @file Checks of a user's model and of what its `loss` returns. */
import { MoeError } from '@moe/core'
import type { LossOutput, TrainableModel } from './model.ts'

/** @throws MoeError E_ATTR */
export function checkModel(op: string, model: TrainableModel): void {
  if (typeof model?.loss === 'function') return
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: model ? 'the model has no method loss' : `the model is ${model}`,
    fix: 'pass a Module with lookahead and loss, such as a DeepSeek; see "Your own model" in the README of @moe/trainer',
  })
}

/** Returns the output of `loss` after checking it. @throws MoeError E_ATTR */
export function checkedLoss(output: LossOutput): LossOutput {
  const problem = problemWith(output)
  if (problem === undefined) return output
  const given: unknown = output
  const isPromise = given instanceof Promise
  // Its tensors are freed while it runs, so it will probably reject, and nobody awaits it.
  if (isPromise) given.catch(() => undefined)
  const fix = isPromise
    ? 'make it synchronous; the trainer reads the tensors after the step'
    : 'return { loss, nll, count, metrics }: two scalar tensors, the number of counted positions, and scalar tensors to log by name (or {})'
  throw new MoeError({ code: 'E_ATTR', op: 'loss', problem: `the model returned ${problem}`, fix })
}

function problemWith(output: Partial<LossOutput> | null | undefined): string | undefined {
  if (output instanceof Promise) return 'a promise'
  if (typeof output !== 'object' || output === null) return `${output}`
  if ('backend' in output) return 'a single tensor'
  const { loss, nll, count, metrics } = output
  if (typeof count !== 'number') return `count = ${count}`
  if (typeof metrics !== 'object' || metrics === null) return `metrics = ${metrics}`
  for (const [name, value] of Object.entries({ loss, nll, ...metrics })) {
    if (value?.backend === undefined) return `${name} = ${value}, which is not a tensor`
    if (value.size !== 1) return `${name} of shape [${value.shape}]`
  }
  return undefined
}
