import { inspect } from 'node:util'
import fc from 'fast-check'
import { beforeEach, describe, expect, test } from 'vitest'
import { backward } from './autograd/backward.ts'
import type { Backend } from './backend.ts'
import { needAxes } from './checks.ts'
import { fromHost, ones, tensor, zeros } from './create.ts'
import { setDefaultBackend } from './default-backend.ts'
import { type DType, dtypes, encodeHost } from './dtype.ts'
import { globalNorm } from './fused/adamw.ts'
import { softmax } from './fused/softmax.ts'
import { Linear } from './nn/layers.ts'
import { disposeModule } from './nn/module.ts'
import { Parameter } from './parameter.ts'
import { concat, setRows, where } from './primitives.ts'
import { referenceBackend } from './reference/index.ts'
import type { Tensor } from './tensor.ts'

let backend: Backend
beforeEach(() => {
  backend = referenceBackend()
  setDefaultBackend(backend)
})
const list = async (t: Tensor) => Array.from(await t.values())
const code = (wanted: string, message = /./) =>
  expect.objectContaining({ code: wanted, message: expect.stringMatching(message) })

test('util.inspect describes a tensor, also inside an object', () => {
  const x = tensor([1, 2])
  expect(inspect({ x, weight: new Parameter(ones([2, 3])) })).toBe('{ x: Tensor f32 [2], weight: Parameter f32 [2,3] }')
  x.dispose()
  expect(inspect(x)).toBe('Tensor f32 [2] (freed)')
})

test('the mean of no elements is 0, and its gradient empty', async () => {
  const x = new Parameter(zeros([2, 0]))
  expect(await list(x.mean())).toEqual([0])
  expect(await list(x.mean(1))).toEqual([0, 0])
  expect(await list(x.mean(0))).toEqual([])
  backward(x.mean().add(x.mean(1).sum()))
  expect(x.grad?.shape).toEqual([2, 0])
})

test('a tensor converted to a string or to JSON gives the same description', () => {
  const weight = new Parameter(ones([2, 3]))
  expect(`loss ${tensor([1, 2])}`).toBe('loss Tensor f32 [2]')
  expect(JSON.stringify({ weight })).toBe('{"weight":"Parameter f32 [2,3]"}')
})

describe('invalid arguments are rejected by name:', () => {
  const x = () => ones([2, 3])
  const wrong = (value: unknown) => value as Tensor
  test.each<[string, () => unknown, string]>([
    [
      'an array',
      () => x().add(wrong([1, 2])),
      'add: rhs is an array, not a tensor; pass a tensor, such as tensor(numbers, shape)',
    ],
    ['undefined', () => x().mul(wrong(undefined)), 'mul: rhs is undefined'],
    ['a string', () => x().sub(wrong('3')), 'sub: rhs is the string "3"'],
    ['a number', () => where(x().lt(1), wrong(1), x()), 'where: a is the number 1'],
    ['a module', () => x().add(wrong(new Linear(2, 2))), 'add: rhs is a Linear'],
    ['a right operand', () => x().matmul(wrong([[1]])), 'matmul: rhs is an array'],
    ['an input of a fused op', () => softmax(wrong(null)), 'softmax: x is null'],
    ['a part of concat', () => concat([wrong(undefined), x()], 1), 'concat: input 0 is undefined'],
    [
      'a tensor instead of the list of parts',
      () => concat(x() as unknown as Tensor[]),
      'concat: the parts are a Tensor, not an array; pass an array of tensors: [a, b]',
    ],
    ['an input of a layer', () => new Linear(2, 2).forward(wrong([1, 2])), 'linear: x is an array'],
    ['a loss', () => backward(wrong(Promise.resolve(1))), 'backward: the loss is a promise'],
    [
      'missing values',
      () => tensor(undefined as unknown as number[]),
      'tensor: the values are undefined; pass a flat array of numbers',
    ],
    ['a number instead of values', () => tensor(5 as unknown as number[]), 'tensor: the values are the number 5'],
    [
      'nested values',
      () =>
        tensor([
          [1, 2],
          [3, 4],
        ] as unknown as number[]),
      'tensor: value 0 is an array; pass a flat array of numbers',
    ],
    [
      'a number instead of a shape',
      () => x().reshape(3 as unknown as number[]),
      'reshape: the shape is 3, not an array; pass an array such as',
    ],
    [
      'another number of axes',
      () => needAxes('Layer', x(), ['batch', 'time', 'hidden']),
      'Layer: the input has shape [2,3], expected [batch, time, hidden]; reshape it',
    ],
    [
      'an axis of another size',
      () => needAxes('Layer', x(), ['tokens', 4]),
      'Layer: the input has shape [2,3], expected [tokens, 4]; create the module with the size of the input',
    ],
    [
      'a number instead of the shape of zeros',
      () => zeros(3 as unknown as number[]),
      'zeros: the shape is 3, not an array',
    ],
    ['a number instead of axes', () => x().permute(1 as unknown as number[]), 'permute: axes is 1, not an array'],
  ])('%s', (_, run, message) => {
    expect(run).toThrow(expect.objectContaining({ name: 'MoeError', message: expect.stringContaining(message) }))
  })
})

test('the error of a freed parameter says that its model was freed', () => {
  const layer = new Linear(2, 3)
  disposeModule(layer)
  expect(() => layer.forward(ones([1, 2]))).toThrow(
    code('E_DISPOSED', /freed with its model: create the model again.* another rank trains arrive with gather\(\)/),
  )
  const freed = ones([2])
  freed.dispose()
  expect(() => freed.add(1)).toThrow(code('E_DISPOSED', /return it from its scope/))
})

describe('reading', () => {
  test('item returns the only element, and rejects a tensor with more', async () => {
    expect(await tensor([7], [1, 1]).item()).toBe(7)
    await expect(tensor([7, 8]).item()).rejects.toMatchObject(
      code('E_SHAPE', /\[2\] has 2 elements, expected 1; reduce it/),
    )
  })

  test('to copies to another backend', async () => {
    const other = referenceBackend()
    const x = tensor([1, 2])
    const y = await x.to(other)
    x.dispose()
    expect(y.backend).toBe(other)
    expect(await list(y)).toEqual([1, 2])
  })
})

describe('numbers as operands', () => {
  test('take the dtype and backend of the tensor, and leave no handle', async () => {
    const other = referenceBackend()
    const x = tensor(Int32Array.of(7, -7), [2], { backend: other })
    expect(await list(x.div(2))).toEqual([3, -3])
    expect(await list(x.eq(7))).toEqual([1, 0])
    expect(other.stats().handles).toBe(3)
    expect(backend.stats().handles).toBe(0)
  })

  test('a fraction with an integer tensor is rejected, not truncated', () => {
    const x = tensor(Int32Array.of(1, 2))
    expect(() => x.mul(0.5)).toThrow(code('E_DTYPE', /0\.5.*i32.*cast\('f32'\)/))
    expect(() => x.lt(Number.POSITIVE_INFINITY)).toThrow(code('E_DTYPE'))
  })

  test('a number outside of i32 is rejected, not wrapped around', async () => {
    const x = tensor(Int32Array.of(1, 2))
    expect(() => x.lt(2 ** 31)).toThrow(code('E_DTYPE', /^lt: 2147483648 would overflow, because the tensor is i32/))
    expect(await list(x.add(-(2 ** 31)))).toEqual([1 - 2 ** 31, 2 - 2 ** 31])
  })

  test('leave no handle if the op is rejected', () => {
    const [bytes, integers] = [tensor(Uint8Array.of(1)), tensor(Int32Array.of(1))]
    expect(() => bytes.eq(1)).toThrow(code('E_DTYPE'))
    expect(() => integers.pow(2)).toThrow(code('E_DTYPE'))
    expect(backend.stats().handles).toBe(2)
  })
})

describe('dtypes', () => {
  const allowed: Record<string, readonly DType[]> = {
    exp: ['f32'],
    abs: ['f32', 'i32'],
    add: ['f32', 'i32'],
    pow: ['f32'],
    sum: ['f32', 'i32'],
    topk: ['f32'],
    matmul: ['f32'],
    lt: ['f32', 'i32'],
    reshape: dtypes,
    permute: dtypes,
    slice: dtypes,
    cast: dtypes,
  }
  const ops: Record<string, (x: Tensor) => unknown> = {
    exp: x => x.exp(),
    abs: x => x.abs(),
    add: x => x.add(x),
    pow: x => x.pow(x),
    sum: x => x.sum(),
    topk: x => x.topk(1),
    matmul: x => x.matmul(x, { transposeB: true }),
    lt: x => x.lt(x),
    reshape: x => x.reshape([2, 1]),
    permute: x => x.permute([1, 0]),
    slice: x => x.narrow(1, 0, 1),
    cast: x => x.cast('f32').cast('bf16'),
  }
  for (const [name, op] of Object.entries(ops)) {
    test(`${name} takes ${allowed[name].join(', ')} and rejects others with a fix`, () => {
      for (const dtype of dtypes) {
        const x = fromHost(encodeHost(dtype, [1, 2]), [1, 2], dtype)
        if (allowed[name].includes(dtype)) op(x)
        else expect(() => op(x), dtype).toThrow(code('E_DTYPE', new RegExp(`${dtype}.*cast it with .cast\\('f32'\\)`)))
      }
    })
  }

  test('operands of different dtypes are rejected', () => {
    const [x, i] = [tensor([1]), tensor(Int32Array.of(1))]
    const mixed = code('E_DTYPE', /dtypes differ, lhs f32 rhs i32; cast one of them/)
    expect(() => x.add(i)).toThrow(mixed)
    expect(() => x.lt(i)).toThrow(mixed)
    expect(() => concat([x, i])).toThrow(mixed)
    expect(() => where(x.lt(2), x, i)).toThrow(mixed)
    expect(() => where(x, x, x)).toThrow(code('E_DTYPE', /condition has dtype f32, expected u8/))
    expect(() => x.takeRows(x)).toThrow(code('E_DTYPE', /index has dtype f32, expected i32/))
  })
})

describe('products', () => {
  test('fold the leading axes of a left operand, and multiply equal leading axes batchwise', async () => {
    const naive = (a: number[][], b: number[][]) =>
      a.map(row => b[0].map((_, j) => row.reduce((s, x, k) => s + x * b[k][j], 0)))
    const a = Array.from({ length: 12 }, (_, i) => i - 5)
    const b = Array.from({ length: 12 }, (_, i) => (i % 5) - 2)
    const matrix = (v: number[], rows: number, columns: number, at = 0) =>
      Array.from({ length: rows }, (_, i) => v.slice((at + i) * columns, (at + i + 1) * columns))
    const folded = tensor(a, [2, 2, 3]).matmul(tensor(b, [3, 4]))
    expect(folded.shape).toEqual([2, 2, 4])
    expect(await list(folded)).toEqual(naive(matrix(a, 4, 3), matrix(b, 3, 4)).flat())
    const expected = [0, 1].flatMap(i => naive(matrix(a, 2, 3, 2 * i), matrix(b, 3, 2, 3 * i)).flat())
    for (const lead of [[2], [1, 2], [1, 2, 1]]) {
      const batched = tensor(a, [...lead, 2, 3]).matmul(tensor(b, [...lead, 3, 2]))
      expect(batched.shape).toEqual([...lead, 2, 2])
      expect(await list(batched)).toEqual(expected)
    }
  })

  test('with transpose flags equal the products of the transposed matrices', async () => {
    const sizes = fc.record({ m: fc.nat(3), k: fc.nat(3), n: fc.nat(3) })
    const matrix = (rows: number, columns: number) =>
      tensor(
        Array.from({ length: rows * columns }, (_, i) => ((i * 7) % 11) - 5),
        [rows, columns],
      )
    await fc.assert(
      fc.asyncProperty(sizes, fc.boolean(), fc.boolean(), async ({ m, k, n }, transposeA, transposeB) => {
        const a = transposeA ? matrix(k, m) : matrix(m, k)
        const b = transposeB ? matrix(n, k) : matrix(k, n)
        const flip = (t: Tensor, on: boolean) => (on ? t.permute([1, 0]) : t)
        const plain = flip(a, transposeA).matmul(flip(b, transposeB))
        expect(plain.shape).toEqual([m, n])
        expect(await list(a.matmul(b, { transposeA, transposeB }))).toEqual(await list(plain))
      }),
      { seed: 9 },
    )
  })

  test('of shapes that do not fit are rejected with both shapes or a fix', () => {
    expect(() => ones([2, 3, 8]).matmul(ones([4, 8]))).toThrow(
      code('E_SHAPE', /^matmul: inner sizes differ, lhs \[6,8\] rhs \[4,8\]: 8 != 4; pass \{ transposeB: true \}/),
    )
    expect(() => ones([3]).matmul(ones([3, 2]))).toThrow(code('E_SHAPE', /both sides need at least 2 axes/))
    for (const [a, b, transposeA] of [
      [[2, 2, 3], [3, 3, 2], false],
      [[2, 3], [3, 3, 2], false],
      [[2, 3, 2], [3, 2], true],
    ] as const)
      expect(() => ones(a).matmul(ones(b), { transposeA })).toThrow(code('E_SHAPE', /leading axes differ/))
  })
})

describe('movement', () => {
  test('invalid shapes, axes and ranges are rejected with the values involved', () => {
    const x = zeros([2, 3])
    const cases: Array<[() => unknown, RegExp]> = [
      [() => x.reshape([4, 2]), /\[2,3\] has 6 elements and cannot become \[4,2\]/],
      [() => x.reshape([-1, -1]), /./],
      [() => x.reshape([-1, 4]), /./],
      [() => x.permute([0, 0]), /axes \[0,0\] are not a permutation/],
      [() => x.permute([0]), /not a permutation/],
      [() => x.expand([2, 4]), /\[2,3\] does not broadcast to \[2,4\]; counting axes from the right/],
      [() => x.expand([3]), /\[2,3\] does not broadcast to \[3\]/],
      [() => x.permute([0, 0.5]), /not a permutation/],
      [() => zeros([1]).expand([-1]), /expand: expected sizes that are non-negative integers, got \[-1\]/],
      [() => zeros([1]).expand([2.5]), /got \[2.5\]/],
      [
        () => x.narrow(1, 2, 4),
        /^narrow: start 2 and end 4 are out of range for axis 1 of \[2,3\]; pass 0 <= start <= end <= 3/,
      ],
      [() => x.narrow(1, 2, 1), /are out of range for/],
      [() => x.narrow(1, 0.5, 1.5), /are out of range for/],
      [() => x.slice([0], [2]), /are out of range for/],
      [() => x.pad([0], [0]), /do not fit \[2,3\]/],
      [() => x.pad([0, -1], [0, 0]), /do not fit/],
      [() => x.pad([0, 0.5], [0, 0.5]), /do not fit/],
      [
        () => concat([x, zeros([2, 4])]),
        /part 1 has shape \[2,4\], part 0 \[2,3\]; make all sizes except that of axis 0/,
      ],
      [() => concat([]), /concat: the list of tensors is empty; pass at least one/],
      [() => globalNorm([]), /globalNorm: the list of tensors is empty; pass at least one/],
      [() => x.topk(4), /k is 4, out of range for the last axis of \[2,3\]; pass a k from 1/],
      [() => zeros([]).takeRows(tensor(Int32Array.of(0))), /scalar, which has no rows/],
    ]
    for (const [call, message] of cases) expect(call, `${call}`).toThrow(code('E_SHAPE', message))
  })

  test('one size of a reshape may be inferred, even without elements', () => {
    expect(zeros([2, 3]).reshape([3, -1]).shape).toEqual([3, 2])
    expect(zeros([0, 3]).reshape([3, -1]).shape).toEqual([3, 0])
  })

  test('ops that change nothing return their input', () => {
    const x = zeros([2, 3])
    expect(x.reshape([2, -1])).toBe(x)
    expect(x.expand([2, 3])).toBe(x)
    expect(x.narrow(0, 0, 2)).toBe(x)
    expect(x.cast('f32')).toBe(x)
    expect(concat([x])).toBe(x)
  })
})

test('arrays that the caller changes afterwards change neither tensors nor their gradients', async () => {
  const shape = [2, 3]
  const made = [zeros(shape), tensor([1, 2, 3, 4, 5, 6], shape), fromHost(new Float32Array(6), shape, 'f32')]
  made.push(
    ...[[3, 2], shape].map(of => zeros([6]).reshape(of)),
    zeros([3]).expand(shape),
    ones([4, 4]).slice([0, 0], shape),
  )
  shape.fill(50)
  expect(made.map(x => x.shape)).toEqual([
    [2, 3],
    [2, 3],
    [2, 3],
    [3, 2],
    [2, 3],
    [2, 3],
    [2, 3],
  ])

  const gradientOf = (use: (x: Tensor) => Tensor, change: () => void) => {
    const x = new Parameter(tensor([1, 2, 3, 4, 5, 6], [1, 2, 3]))
    const y = use(x)
    change()
    backward(
      y
        .mul(
          tensor(
            Array.from({ length: y.size }, (_, i) => i),
            y.shape,
          ),
        )
        .sum(),
    )
    return list(x.grad as Tensor)
  }
  const [axes, starts, before] = [
    [2, 0, 1],
    [0, 1, 0],
    [0, 1, 0],
  ]
  expect(
    await gradientOf(
      x => x.permute(axes),
      () => axes.sort(),
    ),
  ).toEqual([0, 2, 4, 1, 3, 5])
  expect(
    await gradientOf(
      x => x.slice(starts, [1, 1, 3]),
      () => starts.fill(0),
    ),
  ).toEqual([0, 0, 0, 0, 1, 2])
  expect(
    await gradientOf(
      x => x.pad(before, [0, 0, 0]),
      () => before.fill(0),
    ),
  ).toEqual([3, 4, 5, 6, 7, 8])
  const parts: Tensor[] = []
  const joined = (x: Tensor) => {
    parts.push(x, x)
    return concat(parts)
  }
  expect(await gradientOf(joined, () => parts.splice(0))).toEqual([6, 8, 10, 12, 14, 16])
})

test('concat of a single tensor checks its arguments too', () => {
  expect(() => concat([zeros([2])], 1)).toThrow(code('E_ATTR', /^concat: axis 1/))
  expect(() => concat([undefined as never])).toThrow(code('E_ATTR', /^concat: input 0 is undefined/))
})

describe('donation', () => {
  test('setRows donates its input only if requested, and never a recorded one', async () => {
    const index = tensor(Int32Array.of(1))
    const plain = tensor([1, 2])
    expect(await list(setRows(plain, index, tensor([9])))).toEqual([1, 9])
    expect(await list(plain)).toEqual([1, 2])
    setRows(plain, index, tensor([9]), { donate: true })
    expect(plain.disposed).toBe(true)
    const parameter = new Parameter(tensor([1, 2]))
    setRows(parameter, index, tensor([9]), { donate: true })
    expect(parameter.disposed).toBe(false)
  })
})

test('operands on different backends are rejected', () => {
  const other: Backend = { ...referenceBackend(), name: 'elsewhere' }
  expect(() => ones([2]).add(ones([2], { backend: other }))).toThrow(
    code(
      'E_BACKEND_MIX',
      /^add: inputs are on different backends, reference and elsewhere; copy one with await x\.to\(backend\)/,
    ),
  )
})
