/** @file Ops with a custom gradient rule. */
import { needTensor } from '../checks.ts'
import { full } from '../create.ts'
import { isFloat } from '../dtype.ts'
import { MoeError, shown } from '../errors.ts'
import { scope } from '../scope.ts'
import { sameShape, showShape } from '../shape.ts'
import { type GradientSource, isRecording, noGrad, noteUse, record } from '../tape.ts'
import type { Tensor } from '../tensor.ts'

/** A tensor for each element of the array type `T`; one if `T` is a single tensor. */
export type TensorFor<T> = T extends readonly Tensor[] ? { readonly [K in keyof T]: Tensor } : readonly [Tensor]

/** What a custom gradient rule gets in addition to the gradients. */
export interface CustomGradientContext<Outputs = readonly Tensor[], Inputs = readonly Tensor[]> {
  /** The arguments of `forward`. */
  readonly inputs: TensorFor<Inputs>
  /** The results of `forward`. */
  readonly outputs: TensorFor<Outputs>
  /** Returns whether the gradient of that input is wanted. */
  needs(input: number): boolean
}

/**
 * Maps the gradients of the outputs (zeros where there is none) to the gradients of the inputs. Each has the shape of
 * its input, or is null if there is none or it is not wanted. Ops inside the rule are not recorded.
 */
export type CustomGradient<Outputs = readonly Tensor[], Inputs = readonly Tensor[]> = (
  gradients: TensorFor<Outputs>,
  context: CustomGradientContext<Outputs, Inputs>,
) => { readonly [K in keyof Inputs]: Tensor | null }

/**
 * Runs `forward` as one op with a custom gradient: for example a straight-through estimator, a closed form, or a
 * deliberately different gradient. Corresponds to `torch.autograd.Function`, `tf.customGrad` and `jax.custom_vjp`.
 *
 * Nothing inside `forward` is recorded, so a parameter that it reads gets a gradient only if it is among `inputs`. If
 * the rule needs more than inputs and outputs, return it from `forward` as an additional output.
 * @param forward returns one tensor or several, computed from `inputs`
 * @throws MoeError E_ATTR if `forward` or `rule` is not a function. In `backward`: E_SHAPE if the rule returns a
 * gradient of the wrong shape or the wrong number of gradients, E_DTYPE for an integer gradient
 */
export function customGradient<const T extends Tensor | readonly Tensor[], Inputs extends Tensor[]>(
  forward: (...inputs: Inputs) => T,
  rule: CustomGradient<T, Inputs>,
  ...inputs: Inputs
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
    // Detach, because an input that is returned unchanged would bring its history along.
    return (Array.isArray(made) ? made.map(output => output.detach()) : (made as Tensor).detach()) as T
  })
  // A copy, because the array is the caller's.
  const outputs: readonly Tensor[] = Array.isArray(result) ? result.slice() : [result as Tensor]
  if (isRecording()) record('customGradient', inputs, null, outputs, sourceOf(rule as unknown as CustomGradient))
  else noteUse(inputs)
  return result
}

function sourceOf(rule: CustomGradient): GradientSource<Tensor> {
  return {
    vjp({ inputs, outputs, needs }, outputGradients) {
      const gradients = outputGradients.map((gradient, i) => gradient ?? zeros(outputs[i]))
      const given = rule(gradients, { inputs, outputs, needs })
      if (!Array.isArray(given) || given.length !== inputs.length) {
        throw gradientError(
          'E_SHAPE',
          `the rule returned ${Array.isArray(given) ? `${given.length} gradients` : shown(given)} for ${inputs.length} inputs`,
          'return an array with a tensor or null for each input',
        )
      }
      for (const [i, gradient] of given.entries()) checkGradient(gradient, inputs[i], i)
      return given
    },
    decompose: () => [],
  }
}

/** Integer outputs never receive a gradient. */
const zeros = (output: Tensor) =>
  full(output.shape, 0, { dtype: isFloat(output.dtype) ? 'f32' : 'i32', backend: output.backend })

function checkGradient(gradient: Tensor | null, input: Tensor, i: number): void {
  if (gradient === null) return
  needTensor('customGradient', `the gradient of input ${i}`, gradient)
  if (!sameShape(gradient.shape, input.shape)) {
    throw gradientError(
      'E_SHAPE',
      `the gradient of input ${i} has shape ${showShape(gradient.shape)}, the input ${showShape(input.shape)}`,
      'return a gradient of the shape of the input; sum over axes that were broadcast in the forward pass',
    )
  }
  if (!isFloat(gradient.dtype))
    throw gradientError('E_DTYPE', `the gradient of input ${i} has dtype ${gradient.dtype}`, "cast it to 'f32'")
}

const gradientError = (code: 'E_SHAPE' | 'E_DTYPE', problem: string, fix: string) =>
  new MoeError({ code, op: 'customGradient', problem, fix })
