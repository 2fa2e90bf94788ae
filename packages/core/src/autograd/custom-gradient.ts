/** @file Ops whose gradient rule is the caller's. */
import { context, noGrad } from '../context.ts'
import { full } from '../create.ts'
import { isFloat } from '../dtype.ts'
import { MoeError, shown } from '../errors.ts'
import { needTensor } from '../need-tensor.ts'
import { scope } from '../scope.ts'
import { sameShape, showShape } from '../shape.ts'
import { type GradientSource, record, type Tensor } from '../tensor.ts'

/** What a gradient rule sees beside gradients. */
export interface CustomGradientContext {
  /** What `forward` was given. */
  readonly inputs: readonly Tensor[]
  /** What it gave. */
  readonly outputs: readonly Tensor[]
  /** Whether the gradient of that input is wanted. */
  needs(input: number): boolean
}

/**
 * From gradients of the outputs (zeros where none flows) to those of the inputs, each of the input's shape, null where there is none or none is wanted. Ops in
 * it are not recorded.
 */
export type CustomGradient = (
  gradients: readonly Tensor[],
  context: CustomGradientContext,
) => ReadonlyArray<Tensor | null>

/**
 * Runs `forward` as one op whose gradient is what `rule` says: a straight-through estimator, a closed form, a gradient that is to be another one on purpose. As
 * `torch.autograd.Function`, `tf.customGrad` and `jax.custom_vjp`.
 *
 * Nothing inside is recorded: a parameter that `forward` reads gets a gradient only if it is among `inputs`. What the rule needs beside inputs and outputs,
 * `forward` returns as one more output.
 * @param forward gives a tensor or several, made of `inputs`
 * @throws MoeError in `backward`, E_SHAPE where the rule gives a gradient of another shape or for another number of inputs, E_DTYPE for one of integers
 */
export function customGradient<T extends Tensor | readonly Tensor[]>(
  forward: (...inputs: Tensor[]) => T,
  rule: CustomGradient,
  ...inputs: Tensor[]
): T {
  for (const input of inputs) needTensor('customGradient', 'an input', input)
  if (typeof forward !== 'function' || typeof rule !== 'function') {
    const problem = `forward is ${shown(forward)}, rule is ${shown(rule)}`
    throw new MoeError({ code: 'E_ATTR', op: 'customGradient', problem, fix: 'pass two functions, then the inputs' })
  }
  const result = scope(() => {
    const made = noGrad(() => forward(...inputs))
    const all = Array.isArray(made) ? made : [made]
    for (const output of all) needTensor('customGradient', 'what the function returned', output)
    // One that is handed through has the history of the input otherwise.
    return (Array.isArray(made) ? made.map(output => output.detach()) : (made as Tensor).detach()) as T
  })
  const outputs = (Array.isArray(result) ? result : [result]) as readonly Tensor[]
  if (context.recording) record('customGradient', inputs, null, outputs, sourceOf(rule))
  return result
}

function sourceOf(rule: CustomGradient): GradientSource {
  return {
    vjp({ inputs, outputs, needs }, flowing) {
      const gradients = flowing.map((gradient, i) => gradient ?? zeros(outputs[i]))
      const given = rule(gradients, { inputs, outputs, needs })
      if (!Array.isArray(given) || given.length !== inputs.length) {
        throw refused(
          'E_SHAPE',
          `the rule gives ${Array.isArray(given) ? `${given.length} gradients` : shown(given)} for ${inputs.length} inputs`,
          'return an array with a tensor or null for each input',
        )
      }
      for (const [i, gradient] of given.entries()) checkGradient(gradient, inputs[i], i)
      return given
    },
    decompose: () => [],
  }
}

/** Of integers no gradient is asked for. */
const zeros = (output: Tensor) =>
  full(output.shape, 0, { dtype: isFloat(output.dtype) ? 'f32' : 'i32', backend: output.backend })

function checkGradient(gradient: Tensor | null, input: Tensor, i: number): void {
  if (gradient === null) return
  needTensor('customGradient', `the gradient of input ${i}`, gradient)
  if (!sameShape(gradient.shape, input.shape)) {
    throw refused(
      'E_SHAPE',
      `the gradient of input ${i} has shape ${showShape(gradient.shape)}, the input ${showShape(input.shape)}`,
      'give both the same shape; what was broadcast on the way forward is summed on the way back',
    )
  }
  if (!isFloat(gradient.dtype))
    throw refused('E_DTYPE', `the gradient of input ${i} has dtype ${gradient.dtype}`, "cast it to 'f32'")
}

const refused = (code: 'E_SHAPE' | 'E_DTYPE', problem: string, fix: string) =>
  new MoeError({ code, op: 'customGradient', problem, fix })
