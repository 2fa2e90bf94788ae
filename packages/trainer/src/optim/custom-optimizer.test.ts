import { type NamedParameter, Parameter, type StateSource, type Tensor, tensor, zeros } from '@moe/core'
import { expect, test } from 'vitest'
import { temporaryFolder } from '../test-model.ts'
import { backend, run, stopAfter } from '../test-run.ts'
import type { Optimizer, OptimizerEntry } from './optimizer.ts'

/** Stochastic gradient descent with momentum, without a thought for memory or recording. */
class Momentum implements Optimizer {
  readonly name = 'momentum'
  readonly #states: ReadonlyArray<NamedParameter & { readonly momentum: Parameter }>

  constructor(parameters: readonly NamedParameter[]) {
    this.#states = parameters
      .filter(({ parameter }) => parameter.trainable)
      .map(({ name, parameter }) => ({ name, parameter, momentum: new Parameter(zeros(parameter.shape)) }))
  }

  settings() {
    return { beta: 0.9 }
  }

  step(lr: number, gradScale: Tensor) {
    for (const { parameter, momentum } of this.#states) {
      if (parameter.grad === null) continue
      momentum.assign(momentum.mul(0.9).add(parameter.grad.mul(gradScale)))
      parameter.assign(parameter.sub(momentum.mul(lr)))
    }
  }

  entries(): OptimizerEntry[] {
    return this.#states.map(({ name, parameter, momentum }) => ({
      name: `momentum.${name}`,
      dtype: 'f32',
      shape: parameter.shape,
      data: () => momentum.data(),
      parameter,
    }))
  }

  async load(source: StateSource) {
    for (const { name, parameter, momentum } of this.#states)
      momentum.assign(tensor(await source.read(`momentum.${name}`), parameter.shape))
  }

  dispose() {
    for (const { momentum } of this.#states) momentum.dispose()
  }
}

const optimizer = (parameters: readonly NamedParameter[]) => new Momentum(parameters)

test('steps of a custom optimizer leave no tensors behind', async () => {
  const handles: number[] = []
  await run({
    optimizer,
    onEvent: event => {
      if (event.type === 'step') handles.push(backend.stats().handles)
    },
  })
  expect(new Set(handles.slice(1)).size).toBe(1)
})

test('a run with a custom optimizer resumes bit for bit', async () => {
  const out = await temporaryFolder()
  const whole = await run({ optimizer })
  await run({ optimizer, out, ...stopAfter(5) })
  const resumed = await run({ optimizer, out, resume: true })
  expect(resumed.weights).toEqual(whole.weights)
  expect(resumed.result.trainingLoss).toBe(whole.result.trainingLoss)
})
