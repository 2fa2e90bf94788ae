/** @file Creates modules whose initial weights are drawn after construction, without blocking the event loop. */
import { fromHost } from '../create.ts'
import { MoeError } from '../errors.ts'
import type { Parameter } from '../parameter.ts'
import type { Random } from '../random.ts'
import { disposeOnError } from '../scope.ts'
import { sizeOf } from '../shape.ts'
import { pacer } from '../turns.ts'
import { disposeModule, type Module } from './module.ts'
import { QuantizedParameter, weightShape } from './quantized.ts'

/** Normal numbers still to be drawn for a parameter of zeros. */
interface Draw {
  readonly parameter: Parameter
  readonly random: Random
  readonly std: number
}

let pending: Draw[] | null = null

/** The list of deferred draws of initial weights, or null if weights are drawn at once. Internal. */
export const pendingDraws = (): Draw[] | null => pending

/**
 * Returns the module that `make()` constructs, without blocking the event loop: the constructor fills weights with
 * zeros, and the initial numbers, the same as without `createModule`, are drawn afterwards in steps. About 10 million
 * numbers are drawn per second; an ordinary constructor blocks timers, signals and sockets for that time. If anything
 * fails, nothing of the module stays on the device.
 * @throws MoeError E_ATTR if `make` is not synchronous
 */
export async function createModule<M extends Module>(make: () => M): Promise<M> {
  const draws: Draw[] = []
  const module = disposeOnError(() => {
    const outer = pending
    pending = draws
    try {
      return synchronous(make())
    } finally {
      pending = outer
    }
  })
  try {
    // A parameter that was replaced by another, for example in a tied head, is already disposed.
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
    problem: 'the function returned a promise, but weights created after it returns are not deferred',
    fix: 'pass a synchronous function, such as () => new Model()',
  })
}

/** Numbers drawn at a time: whole batches of the generator. */
const CHUNK = 2 ** 16

async function fill({ parameter, random, std }: Draw): Promise<void> {
  const paced = pacer()
  const shape = weightShape(parameter)
  const values = new Float32Array(sizeOf(shape))
  for (let at = 0; at < values.length; at += CHUNK) {
    values.set(random.normal(Math.min(CHUNK, values.length - at), std), at)
    await paced()
  }
  if (parameter instanceof QuantizedParameter) await parameter.assignValues(values)
  else parameter.assign(fromHost(values, shape, 'f32', parameter.backend))
}
