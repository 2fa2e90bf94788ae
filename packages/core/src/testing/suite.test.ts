import { describe, expect, test } from 'vitest'
import type { Backend, FusedKernels, Handle, Kernel, PrimitiveKernels, Value } from '../backend.ts'
import type { DType, HostArray } from '../dtype.ts'
import { MoeError } from '../errors.ts'
import { routerTopkBackwardDefinition, routerTopkDefinition } from '../fused/router-topk.ts'
import { softmax } from '../fused/softmax.ts'
import type { PrimitiveName, RouterAttrs } from '../ops.ts'
import { readF64, referenceBackend } from '../reference/index.ts'
import { scope } from '../scope.ts'
import { noGrad } from '../tape.ts'
import type { Tensor } from '../tensor.ts'
import { compareWithReference } from './compare-with-reference.ts'
import { backendSuite, type SuiteOptions } from './suite.ts'

/** A reference backend in which something was replaced. */
const changed = (change: (base: Backend) => Partial<Backend>): Backend => {
  const base = referenceBackend()
  return { ...base, ...change(base) }
}

/** A reference backend that calls a function after a primitive, with its output and inputs. */
const after = (name: PrimitiveName, edit: (output: Float64Array, inputs: readonly Value[], attrs: never) => void) =>
  changed(base => {
    const kernel = base.primitives[name] as Kernel<never>
    const edited: Kernel<never> = (inputs, attrs, outputs) => {
      const handles = kernel(inputs, attrs, outputs)
      edit(readF64({ ...outputs[0], handle: handles[0] }) as Float64Array, inputs, attrs)
      return handles
    }
    return { primitives: { ...base.primitives, [name]: edited } }
  })

/** The same for calls with a precision. */
const products = (precision: string, edit: (output: Float64Array) => void) =>
  after('matmul', (output, _, attrs: { precision: string }) => void (attrs.precision === precision && edit(output)))

const fused = (kernels: FusedKernels) => changed(() => ({ fused: kernels }))

/** Multiplies each output of a primitive by another number next to 1. */
const unsteady = (name: PrimitiveName) => {
  let calls = 0
  return after(name, output => scale(1 + 1e-6 * calls++)(output))
}

/** Adds a number to an element, by default the last one. */
const add = (error: number, at = -1) => {
  return (output: Float64Array) => output.set([(output.at(at) as number) + error], at < 0 ? output.length + at : at)
}
const scale = (factor: number) => (output: Float64Array) => output.set(output.map(x => x * factor))

const check = async (name: string, backend: Backend, options: SuiteOptions = {}) => {
  const found = backendSuite(async () => backend, options).find(item => item.name.startsWith(name))
  await found?.run()
  return found?.name
}

const takeRows = 'takeRows: of a matrix'
const small = 'matmul: 5x7x9'
const sharing = 'lifetimes: reshape shares memory'

describe('the suite finds', () => {
  test.each<[string, string, Backend, RegExp]>([
    ['a wrong value', 'unary: exp', after('unary', add(1e-3)), /^output 0: 1 of 133 values/],
    ['a wrong value of a second output', 'topk: largest first', secondOutput(1), /^output 1: 1 of 28 values/],
    ['a wrong integer', 'cast: f32 to i32', after('cast', add(-127, 4)), /^output 0: 1 of 7/],
    ['a wrong gradient', takeRows, after('scatterAddRows', add(1e-3)), /^gradient of input 0: 1 of 77 values/],
    [
      'a wrong gradient of one output alone',
      'routerTopk: V3, no groups',
      wrongAlone(),
      /^gradient of input 0 from output 0 alone/,
    ],
    ['other bits the second time', 'unary: exp', unsteady('unary'), /^output 0, second run/],
    ['a gradient with other bits', takeRows, unsteady('scatterAddRows'), /^gradient of input 0, second run/],
    ['a changed input', 'unary: exp', after('unary', (_, [x]) => add(1)(readF64(x) as never)), /^input 0 was changed/],
    ['a leak', 'unary: exp', withLeak(), /^4 handles leaked/],
    ['bf16 gradients with large errors', `${small}, bf16`, products('bf16', noise(0.15)), /^gradient of input 0: norm/],
    ['products that are not rounded to fp8', `${small}, fp8`, unrounded(true), /^output 0: \d+ of 45 values/],
    ['storage that is not copied', 'storage: f32', keepingArrays(), /^elements/],
    ['data of another type', 'storage: f32', ofOtherType(), /^f32 was downloaded as Float64Array/],
    ['a reshape without an owner', sharing, unshared(), /^elements after the first owner is gone/],
    ['late reads', 'lifetimes: a tensor can be freed while it is downloaded', readingLate(), /^the sum/],
    ['donation of shared memory', 'lifetimes: donation', donating(), /^an alias of the donated tensor/],
    ['an optimizer without effect', 'training', fused({ adamwStep: copies }), /^the loss went from/],
  ])('%s', async (_, name, backend, message) => {
    await expect(check(name, backend)).rejects.toThrow(message)
  })

  test.each(['storage: f32', sharing, 'lifetimes: a tensor can', 'lifetimes: donation', 'training'])(
    'leaks: %s',
    async name => {
      await expect(
        check(
          name,
          changed(() => ({ free() {} })),
        ),
      ).rejects.toThrow(/handles? leaked$/)
    },
  )

  test.each([
    ['outputs', 'unary: exp', 'unary'],
    ['gradients', takeRows, 'scatterAddRows'],
    ['programs', 'programs', 'unary'],
  ] as const)('damaged guards after %s', async (_, name, op) => {
    let damaged = false
    const backend = after(op, () => {
      damaged = true
    })
    const guards = () => {
      if (damaged) throw new Error('damaged')
    }
    await expect(check(name, backend, { guards })).rejects.toThrow('damaged')
  })
})

describe('the suite accepts', () => {
  test('a backend without small dtypes that rejects them with E_UNSUPPORTED', async () => {
    const names = ['cast: f32 to bf16', 'pad: of f16', 'fill: bf16', 'errors: an unsupported dtype']
    const refusal = new MoeError({ code: 'E_UNSUPPORTED', op: 'test', problem: 'no' })
    for (const name of [...names, 'quantize:', 'storage: bf16'])
      expect(await check(name, withoutSmallDtypes(refusal))).toBeDefined()
    for (const name of names) {
      await expect(check(name, withoutSmallDtypes(new Error('another')))).rejects.toThrow('another')
      await expect(check(name, withoutSmallDtypes(null))).rejects.toThrow(/but ran the op|did not throw/)
    }
  })

  test('fp8 products in f32 of a backend without fp8, but not rounded ones', async () => {
    await check(`${small}, fp8`, unrounded(false))
    const rounded = changed(() => ({ fp8Matmul: false }))
    await expect(check(`${small}, fp8`, rounded)).rejects.toThrow('output 0')
  })

  test('fp8 products with errors of the bits of their sums', async () => {
    const backend = products('fp8', scale(1 + 2 ** -12))
    await expect(check(`${small}, fp8`, backend)).rejects.toThrow('output 0')
    await check(`${small}, fp8`, backend, { fp8Bits: 10 })
  })

  test('expected failures, only while they fail', async () => {
    const skip = (...checks: string[]): SuiteOptions => ({ skip: [{ reason: 'why', checks }] })
    const options = skip('unary: exp')
    expect(await check('unary: exp', after('unary', add(1)), options)).toBe('unary: exp (expected failure: why)')
    await expect(check('unary: exp', referenceBackend(), options)).rejects.toThrow('is skipped but passes')
    expect(() => backendSuite(async () => referenceBackend(), skip('unary: ex'))).toThrow('unknown check in skip')
  })
})

describe('compareWithReference finds', () => {
  const inputs = [{ data: [0.5, 1, -1, 0], shape: [2, 2] }]
  test.each<[string, Backend, RegExp]>([
    ['a wrong value', after('unary', add(1e-2)), /^outputs 0: 1 of 4/],
    ['a wrong gradient', after('binary', add(1e-2)), /^gradients 0: 1 of 4/],
    ['other bits the second time', unsteady('unary'), /^outputs 0, second run/],
    ['elements that are not written', unwritten(), /^outputs 0, second run/],
    ['a leak', withLeak(), /handles leaked/],
  ])('%s', async (_, backend, message) => {
    await expect(compareWithReference(backend, inputs, x => [x.neg()])).rejects.toThrow(message)
  })

  test('a kernel that declines', async () => {
    const backend = changed(() => ({ name: 'declining', fused: { softmax: () => undefined } }))
    await expect(compareWithReference(backend, inputs, x => [softmax(x)])).rejects.toThrow('declined')
  })
})

/** A `topk` whose last index is off. */
function secondOutput(error: number): Backend {
  return changed(({ primitives }) => {
    const topk: Kernel<{ k: number }> = (inputs, attrs, outputs) => {
      const handles = primitives.topk(inputs, attrs, outputs)
      add(error)(readF64({ ...outputs[1], handle: handles[1] }) as never)
      return handles
    }
    return { primitives: { ...primitives, topk } }
  })
}

/** The gradient of its `routerTopk` is wrong if only the weights have one. */
function wrongAlone(): Backend {
  const kernel =
    (definition: { decompose(inputs: readonly Tensor[], attrs: RouterAttrs): Tensor[] }) =>
    (inputs: readonly Value[], attrs: RouterAttrs) =>
      scope(() => noGrad(() => definition.decompose(inputs as readonly Tensor[], attrs))).map(tensor => {
        const { handle } = tensor
        tensor.handle = null
        return handle
      })
  return fused({
    routerTopk: kernel(routerTopkDefinition),
    routerTopkBackward(inputs, attrs, [spec]) {
      const [handle] = kernel(routerTopkBackwardDefinition)(inputs, attrs)
      if (readF64(inputs[3]).every(x => x === 0)) add(1)(readF64({ ...spec, handle }) as Float64Array)
      return [handle]
    },
  })
}

/** Adds numbers of this size with alternating signs to gradients of the small case. */
function noise(size: number) {
  return (output: Float64Array) =>
    void (output.length !== 45 && output.set(output.map((x, i) => x + (i % 2 ? size : -size))))
}

function withLeak(): Backend {
  const backend: Backend = after('unary', () => void backend.upload(Float32Array.of(1), [1], 'f32'))
  return backend
}

/** Says that it rounds to fp8, or not, and never does. */
function unrounded(fp8Matmul: boolean): Backend {
  return changed(({ primitives }) => {
    const matmul: typeof primitives.matmul = (inputs, attrs, outputs) =>
      primitives.matmul(inputs, { ...attrs, precision: 'f32' }, outputs)
    return { fp8Matmul, primitives: { ...primitives, matmul } }
  })
}

/** Lists only some dtypes, and throws the error, if any, for others. */
function withoutSmallDtypes(error: Error | null): Backend {
  const listed = new Set<DType>(['f32', 'i32', 'u8'])
  return changed(base => {
    const refusing = Object.entries(base.primitives).map(([name, kernel]) => {
      const refused: Kernel<never> = (inputs, attrs, outputs) => {
        if (error !== null && [...inputs, ...outputs].some(({ dtype }) => !listed.has(dtype))) throw error
        return (kernel as Kernel<never>)(inputs, attrs, outputs)
      }
      return [name, refused]
    })
    return { dtypes: listed, primitives: Object.fromEntries(refusing) as PrimitiveKernels }
  })
}

function keepingArrays(): Backend {
  const arrays = new Map<Handle, HostArray>()
  return changed(base => ({
    upload(data, shape, dtype) {
      const handle = base.upload(data, shape, dtype)
      arrays.set(handle, data)
      return handle
    },
    download: async ({ handle }) => (arrays.get(handle) as HostArray).slice(),
  }))
}

function ofOtherType(): Backend {
  return changed(base => ({
    download: async value => Float64Array.from(await base.download(value)) as unknown as HostArray,
  }))
}

/** Its reshapes are not owners of their memory. */
function unshared(): Backend {
  return changed(({ primitives }) => ({ primitives: { ...primitives, reshape: ([x]) => [x.handle] } }))
}

function readingLate(): Backend {
  return changed(base => ({
    async download({ handle, shape, dtype }) {
      await Promise.resolve()
      return base.download({ handle, shape, dtype })
    },
  }))
}

/** Its `setRows` always writes to its input. */
function donating(): Backend {
  return changed(({ primitives }) => {
    const setRows: typeof primitives.setRows = (inputs, attrs, outputs) => {
      const [handle] = primitives.setRows(inputs, { ...attrs, donate: false }, outputs)
      const data = readF64(inputs[0]) as Float64Array
      data.set(readF64({ ...outputs[0], handle }))
      return [handle]
    }
    return { primitives: { ...primitives, setRows } }
  })
}

/** Returns the parameter and its moments as they are. */
function copies([param, , m, v]: readonly Value[]): Handle[] {
  const { reshape } = referenceBackend().primitives
  return [param, m, v].map(value => reshape([value], {}, [value])[0])
}

/** Reuses memory, and does not write the last element of the output of unary ops. */
function unwritten(): Backend {
  const kept: Float64Array[] = []
  return changed(base => ({
    free(handle) {
      const data = readF64({ handle, shape: [], dtype: 'f32' })
      if (data instanceof Float64Array) kept.push(data)
      base.free(handle)
    },
    primitives: {
      ...base.primitives,
      unary(inputs, attrs, outputs) {
        const handles = base.primitives.unary(inputs, attrs, outputs)
        const output = readF64({ ...outputs[0], handle: handles[0] }) as Float64Array
        output[output.length - 1] = kept.findLast(({ length }) => length === output.length)?.at(-1) ?? 0
        return handles
      },
    },
  }))
}
