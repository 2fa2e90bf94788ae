/** @file Modules whose weights are drawn after they were constructed, while the event loop goes on. */

import { fromHost } from '../create.ts'
import { MoeError } from '../errors.ts'
import type { Random } from '../random.ts'
import { allOrNothing } from '../scope.ts'
import { sizeOf } from '../shape.ts'
import { pacer } from '../turns.ts'
import { disposeModule, type Module } from './module.ts'
import type { Parameter } from './parameter.ts'
import { QuantizedParameter, weightShape } from './quantized.ts'

/** Normal numbers that a parameter of zeros is still to get. */
interface Draw {
  readonly parameter: Parameter
  readonly random: Random
  readonly deviation: number
}

let pending: Draw[] | null = null

/** Internal: where initial weights are noted that are drawn later; null where they are drawn at once. */
export const pendingDraws = (): Draw[] | null => pending

/**
 * `make()`, a module, while the event loop goes on: it is constructed with weights of zeros, which then get the numbers that they would have got at
 * once. Some 10 million are drawn in a second, and meanwhile a constructor lets no timer, signal or socket through. When anything fails, nothing of
 * the module stays on the device.
 * @throws MoeError E_ATTR when `make` is not synchronous
 */
export async function createModule<M extends Module>(make: () => M): Promise<M> {
  const draws: Draw[] = []
  const module = allOrNothing(() => {
    const outer = pending
    pending = draws
    try {
      return synchronous(make())
    } finally {
      pending = outer
    }
  })
  try {
    // One whose place another has taken, such as a tied head's, is gone by now.
    for (const draw of draws) if (!draw.parameter.disposed) await fill(draw)
    return module
  } catch (error) {
    disposeModule(module)
    for (const { parameter } of draws) parameter.dispose()
    throw error
  }
}

function synchronous<M>(made: M): M {
  if (!(made instanceof Promise)) return made
  throw new MoeError({
    code: 'E_ATTR',
    op: 'createModule',
    problem: 'the function returned a promise, and what it makes later would be drawn at once',
    fix: 'pass a synchronous function, such as () => new Model()',
  })
}

/** Numbers that are drawn together, whole batches of the generator. */
const CHUNK = 2 ** 16

async function fill({ parameter, random, deviation }: Draw): Promise<void> {
  const paced = pacer()
  const shape = weightShape(parameter)
  const values = new Float32Array(sizeOf(shape))
  for (let at = 0; at < values.length; at += CHUNK) {
    values.set(random.normal(Math.min(CHUNK, values.length - at), deviation), at)
    await paced()
  }
  if (parameter instanceof QuantizedParameter) await parameter.assignValues(values)
  else parameter.assign(fromHost(values, shape, 'f32', parameter.backend))
}
