/** @file Creates modules whose initial weights are drawn after construction, or only where they are needed. */
import { fromHost } from '../create.ts'
import type { Parameter, RowReader } from '../parameter.ts'
import { Random } from '../random.ts'
import { disposeOnError } from '../scope.ts'
import { Setting } from '../setting.ts'
import { type Shape, sizeOf } from '../shape.ts'
import { pacer } from '../turns.ts'
import { disposeModule, type Module, type NamedParameter } from './module.ts'
import { QuantizedParameter, weightShape } from './quantized.ts'

const deferred = new Setting<Parameter[] | null>(null)

/** The parameters whose weights are deferred so far, or null if weights are drawn at once. Internal. */
export const deferredParameters = (): Parameter[] | null => deferred.value

/**
 * Returns the module that `make()` constructs, without memory for its weights. Pass the module to `ExpertParallel` or
 * `Pipeline` of `@moe/parallel`, which create only the weights of this rank, or load weights into it. `materialize`
 * creates the initial weights, the same as without `deferWeights`. Norms and buffers have memory from the start.
 * @throws MoeError E_ATTR if `make` is not synchronous
 */
export function deferWeights<M extends Module>(make: () => M): M {
  return deferring('deferWeights', make).module
}

/**
 * Creates the weights that `deferWeights` deferred, without blocking the event loop: normally distributed numbers, at
 * about 10 million per second. Parameters that already have weights stay as they are.
 * @param parameters of the module, such as `namedParameters(module)`
 */
export async function materialize(parameters: Iterable<Pick<NamedParameter, 'parameter'>>): Promise<void> {
  for (const { parameter } of parameters) {
    const read = parameter.elsewhere
    if (read === null) continue
    const shape = weightShape(parameter)
    const values = await read(0, shape[0] ?? 1)
    if (parameter instanceof QuantizedParameter) await parameter.assignValues(values as Float32Array)
    else parameter.assign(fromHost(values, shape, parameter.dtype, parameter.backend))
  }
}

/**
 * Returns the module that `make()` constructs, without blocking the event loop: the initial numbers, the same as without
 * `createModule`, are drawn in steps. About 10 million numbers are drawn per second; an ordinary constructor blocks
 * timers, signals and sockets for that time. If anything fails, nothing of the module stays on the device.
 * @throws MoeError E_ATTR if `make` is not synchronous
 */
export async function createModule<M extends Module>(make: () => M): Promise<M> {
  const { module, parameters } = deferring('createModule', make)
  try {
    await materialize(parameters.map(parameter => ({ parameter })))
    return module
  } catch (error) {
    disposeModule(module)
    for (const parameter of parameters) parameter.dispose()
    throw error
  }
}

function deferring<M extends Module>(op: string, make: () => M): { module: M; parameters: readonly Parameter[] } {
  const parameters: Parameter[] = []
  return { module: disposeOnError(() => deferred.during(op, parameters, make)), parameters }
}

/** Numbers drawn at a time: whole batches of the generator. */
const CHUNK = 2 ** 16
/** The generator draws numbers in blocks of this size. */
const BLOCK = 4

/** Draws rows of a parameter: the same numbers as those rows of all numbers drawn together. */
export function drawnRows(shape: Shape, random: Random, std: number): RowReader {
  const width = sizeOf(shape.slice(1))
  return async (from, to) => {
    const paced = pacer()
    const values = new Float32Array((to - from) * width)
    if (std === 0) return values
    const before = (from * width) % BLOCK
    const own = new Random(random.seed, random.stream, random.position + (from * width - before) / BLOCK)
    const count = before + values.length
    for (let at = 0; at < count; at += CHUNK) {
      const numbers = own.normal(Math.min(CHUNK, count - at), std)
      values.set(at === 0 ? numbers.subarray(before) : numbers, Math.max(0, at - before))
      await paced()
    }
    return values
  }
}
