/** @file Cases of rotary embeddings, MLA keys and values, attention, and absorbed decoding. */
import type { WidePrecision } from '../../ops.ts'
import { Random } from '../../random.ts'
import { type CaseInput, f32, given, type OpCase, opCase, uniform } from '../case.ts'
import { precisions, rough, sum } from './tolerances.ts'

const tables = (...shape: number[]) => [uniform(-1, 1, ...shape), uniform(-1, 1, ...shape)]
const ropeCases = [true, false].flatMap(interleaved => [
  opCase(
    'rope',
    `whole head, ${interleaved ? 'interleaved' : 'halves'}`,
    [f32(2, 5, 3, 8), ...tables(5, 4)],
    { interleaved, inverse: false },
    { gradient: true },
  ),
  opCase('rope', `last features, ${interleaved ? 'interleaved' : 'halves'}`, [f32(2, 5, 3, 22), ...tables(5, 4)], {
    interleaved,
    inverse: false,
  }),
  opCase('rope', `own positions, ${interleaved ? 'interleaved' : 'halves'}`, [f32(2, 3, 2, 10), ...tables(2, 3, 4)], {
    interleaved,
    inverse: true,
  }),
  opCase(
    'rope',
    `behind other features, ${interleaved ? 'interleaved' : 'halves'}`,
    [f32(2, 3, 2, 10), ...tables(2, 3, 4), f32(2, 3, 2, 5)],
    { interleaved, inverse: false },
    { gradient: true },
  ),
  opCase(
    'rope',
    `nothing in front, ${interleaved ? 'interleaved' : 'halves'}`,
    [f32(1, 3, 2, 12), ...tables(3, 4), f32(1, 3, 2, 0)],
    { interleaved, inverse: false },
  ),
  opCase(
    'rope',
    `20 heads of 192 and 64, ${interleaved ? 'interleaved' : 'halves'}`,
    [f32(1, 3, 20, 64), ...tables(3, 32), f32(1, 3, 20, 192)],
    {
      interleaved,
      inverse: false,
    },
  ),
])

const attentionSizes: ReadonlyArray<readonly [name: string, shape: number[], causal: boolean]> = [
  ['small, causal', [2, 5, 5, 2, 2, 8, 4], true],
  ['small, not causal', [1, 4, 6, 2, 2, 8, 4], false],
  ['one query over many keys', [2, 1, 37, 4, 4, 48, 32], true],
  ['queries behind a prefix', [1, 6, 19, 2, 2, 24, 16], true],
  ['more than a tile', [1, 70, 70, 2, 2, 48, 32], true],
  ['long, odd sizes', [1, 131, 131, 1, 1, 33, 17], true],
  ['shared key head', [2, 9, 9, 4, 1, 16, 8], true],
  ['grouped key heads', [1, 9, 9, 6, 2, 16, 8], true],
  ['more queries than keys', [1, 7, 4, 2, 2, 8, 8], true],
  // GLM-4.7-Flash.
  ['20 heads of 256', [1, 19, 21, 20, 20, 256, 256], true],
]

const attentionCases = attentionSizes.flatMap(([name, [b, t, s, h, g, dk, dv], causal]) =>
  precisions.map(precision =>
    opCase(
      'attention',
      `${name}, ${precision}`,
      [f32(b, t, h, dk), f32(b, s, g, dk), f32(b, s, g, dv)],
      { causal, scale: dk ** -0.5, precision },
      { ...(precision === 'bf16' ? rough() : sum), compared: [0, 1] },
    ),
  ),
)

/**
 * For each of the last `time` of `keys` positions, the start of the text it belongs to, among texts that begin at
 * `begins`.
 */
const lastBegun = (time: number, keys: number, begins: readonly number[]): number[] =>
  Array.from({ length: time }, (_, t) => begins.findLast(begin => begin <= keys - time + t) ?? 0)

/** Packed texts: sizes as above, then the positions where the texts of each row begin. */
const startsSizes: ReadonlyArray<readonly [name: string, shape: number[], causal: boolean, begins: number[][]]> = [
  ['small', [2, 5, 5, 2, 2, 8, 4], true, [[0, 3], [1]]],
  ['grouped key heads', [1, 19, 19, 4, 2, 16, 8], true, [[0, 1, 2, 11]]],
  ['more than a tile', [2, 150, 150, 2, 2, 48, 32], true, [[0, 7, 101, 149], [0]]],
  ['long, odd sizes', [1, 331, 331, 1, 1, 33, 17], true, [[0, 129, 230]]],
  ['few queries, many keys', [1, 4, 900, 2, 1, 16, 8], true, [[0, 500, 898]]],
  ['not causal', [1, 6, 9, 2, 2, 8, 4], false, [[0, 2, 5]]],
  ['one query, features of whole vectors', [1, 1, 90, 2, 1, 32, 16], true, [[0, 50]]],
]

const startsCases = startsSizes.flatMap(([name, [b, t, s, h, g, dk, dv], causal, begins]) =>
  precisions.map(precision =>
    opCase(
      'attention',
      `several texts in a row, ${name}, ${precision}`,
      [
        f32(b, t, h, dk),
        f32(b, s, g, dk),
        f32(b, s, g, dv),
        given('i32', [b], new Array(b).fill(s)),
        given(
          'i32',
          [b, t],
          begins.flatMap(row => lastBegun(t, s, row)),
        ),
      ],
      { causal, scale: dk ** -0.5, precision },
      { ...(precision === 'bf16' ? rough() : sum), compared: [0, 1] },
    ),
  ),
)

/** Three sequences over unordered pages, two of which share their first page. All rows not in use are NaN. */
function pagedInputs(size: number, time: number, dtype: 'f32' | 'bf16'): CaseInput[] {
  const [numbers, features] = [7, 80]
  const lengths = [2 * size + 5, 0, size + size / 2]
  const pages = [
    [4, 2, 6],
    [3, 3, 3],
    [4, 0, 5],
  ]
  const values = new Array<number>(numbers * size * features).fill(Number.NaN)
  const random = new Random(5)
  pages.forEach((row, b) => {
    for (let s = 0; s < lengths[b]; s++) {
      const first = (row[Math.floor(s / size)] * size + (s % size)) * features
      random.normal(features).forEach((x, c) => {
        values[first + c] = x
      })
    }
  })
  return [
    f32(3, time, 8, features),
    given(dtype, [numbers, size, features], values),
    given('i32', [3], lengths),
    given('i32', [3, 3], pages.flat()),
  ]
}

const pagedSizes = [
  { size: 16, time: 1 },
  { size: 64, time: 3 },
]

const pagedCases = pagedSizes.flatMap(({ size, time }) =>
  (['f32', 'bf16'] as const).flatMap(dtype =>
    precisions.map(precision =>
      opCase(
        'latentAttention',
        `pages of ${size}, ${time} at a time, ${dtype === 'f32' ? 'an f32' : 'a bf16'} cache, ${precision}`,
        pagedInputs(size, time, dtype),
        { scale: 0.1, valueDim: 64, precision },
        { ...(precision === 'bf16' ? rough() : sum), gradient: false },
      ),
    ),
  ),
)

/** Sizes: batch, queries, heads, features, keys; then the limits of the queries, row by row. */
const indexSizes: ReadonlyArray<readonly [name: string, sizes: number[], limits?: number[]]> = [
  ['small', [2, 3, 5, 6, 7]],
  ['one query, odd sizes', [1, 1, 3, 5, 37]],
  ['heads of V3.2', [1, 3, 64, 128, 70]],
  ['more keys than a tile', [1, 5, 33, 24, 300]],
  ['more heads than a tile', [1, 2, 150, 16, 130]],
  ['more queries than a tile', [2, 131, 8, 16, 40]],
  ['one head and one feature', [1, 4, 1, 1, 5]],
  ['no keys', [1, 2, 3, 4, 0]],
  ['no queries', [2, 0, 3, 4, 5]],
  ['limits', [2, 4, 5, 8, 9], [1, 2, 3, 9, 0, 12, -1, 5]],
  ['causal limits of several tiles', [1, 150, 4, 16, 280], Array.from({ length: 150 }, (_, t) => 131 + t)],
  ['limits far below the number of keys', [2, 1, 32, 16, 700], [129, 3]],
]

/** Queries or keys. In bf16 they are integers, so that rounding them changes no sign of a product. */
const indexed = (precision: WidePrecision, ...shape: number[]): CaseInput =>
  precision === 'f32' ? f32(...shape) : { shape, dtype: 'f32', random: 'integer', low: -4, high: 5 }

const indexCases = indexSizes.flatMap(([name, [b, t, j, d, s], limits]) =>
  precisions.flatMap(precision => {
    const inputs = [indexed(precision, b, t, j, d), f32(b, t, j), indexed(precision, b, s, d)]
    const seen = limits ? [given('i32', [b, t], limits)] : []
    const tolerance = precision === 'bf16' ? rough(1) : sum
    const gradient = s * t > 0 && precision === 'f32' && limits === undefined
    return [
      opCase('indexScores', `${name}, ${precision}`, [...inputs, ...seen], { precision }, { ...tolerance, gradient }),
      opCase(
        'indexScoresBackward',
        `${name}, ${precision}`,
        [...inputs, f32(b, t, s), ...seen],
        { precision },
        { ...tolerance, gradient: false },
      ),
    ]
  }),
)

/** Every op of an attention layer. */
export const attentionLayerCases: readonly OpCase[] = [
  ...ropeCases,
  opCase('mlaKeyValue', 'fours', [f32(2, 3, 3, 20), f32(2, 3, 1, 4)], { nope: 8 }),
  opCase('mlaKeyValue', 'odd sizes', [f32(2, 5, 2, 8), f32(2, 5, 1, 3)], { nope: 5 }),
  opCase('mlaKeyValue', 'without a plain part', [f32(1, 3, 2, 4), f32(1, 3, 1, 2)], { nope: 0 }),
  opCase('mlaKeyValue', '20 heads of 192 and 256', [f32(1, 3, 20, 448), f32(1, 3, 1, 64)], { nope: 192 }, sum),
  opCase('mlaKeyValue', 'no keys', [f32(1, 0, 2, 6), f32(1, 0, 1, 2)], { nope: 4 }, { gradient: false }),
  opCase(
    'mlaKeyValueBackward',
    'fours',
    [f32(2, 3, 3, 12), f32(2, 3, 3, 12)],
    { nope: 8 },
    { ...sum, gradient: false },
  ),
  opCase(
    'mlaKeyValueBackward',
    'odd sizes',
    [f32(2, 5, 2, 8), f32(2, 5, 2, 3)],
    { nope: 5 },
    { ...sum, gradient: false },
  ),
  ...attentionCases,
  opCase(
    'attention',
    'sequences of different length',
    [f32(3, 2, 2, 16), f32(3, 9, 2, 16), f32(3, 9, 2, 8), given('i32', [3], [9, 2, 5])],
    { causal: true, scale: 0.25, precision: 'f32' },
    sum,
  ),
  opCase(
    'attention',
    'an empty sequence',
    [f32(2, 1, 2, 16), f32(2, 4, 2, 16), f32(2, 4, 2, 8), given('i32', [2], [0, 3])],
    { causal: true, scale: 0.25, precision: 'f32' },
    { ...sum, compared: [0] },
  ),
  ...startsCases,
  opCase(
    'attention',
    'several texts in a row, queries that see none, and one that sees what those before it do not',
    [
      f32(2, 70, 2, 16),
      f32(2, 70, 2, 16),
      f32(2, 70, 2, 8),
      given('i32', [2], [70, 66]),
      given(
        'i32',
        [2, 70],
        [...lastBegun(70, 70, [0, 20, 40]).with(3, 5).with(45, 3).with(69, 70), ...lastBegun(70, 70, [20, 64])],
      ),
    ],
    { causal: true, scale: 0.25, precision: 'f32' },
    { ...sum, compared: [0] },
  ),
  opCase(
    'attentionBackward',
    'usual',
    [f32(2, 6, 4, 16), f32(2, 6, 2, 16), f32(2, 6, 2, 8), f32(2, 6, 4, 8), uniform(3, 5, 2, 4, 6), f32(2, 6, 4, 8)],
    { causal: true, scale: 0.25, precision: 'f32' },
    { ...sum, gradient: false },
  ),
  opCase(
    'latentAttention',
    'one token',
    [f32(2, 1, 4, 24), f32(2, 11, 24), given('i32', [2], [11, 4])],
    { scale: 0.2, valueDim: 16, precision: 'f32' },
    { ...sum, gradient: false },
  ),
  opCase(
    'latentAttention',
    'several tokens',
    [f32(1, 3, 2, 40), f32(1, 150, 40), given('i32', [1], [141])],
    { scale: 0.1, valueDim: 32, precision: 'f32' },
    { ...sum, gradient: false },
  ),
  opCase(
    'latentAttention',
    'NaN behind the rows in use',
    [
      f32(2, 1, 4, 8),
      given(
        'f32',
        [2, 5, 8],
        [24, 8].flatMap(used => Array.from({ length: 40 }, (_, i) => (i < used ? Math.sin(i) : Number.NaN))),
      ),
      given('i32', [2], [3, 1]),
    ],
    { scale: 0.3, valueDim: 4, precision: 'f32' },
    { ...sum, gradient: false },
  ),
  opCase(
    'latentAttention',
    'bf16',
    [f32(1, 1, 8, 80), f32(1, 90, 80), given('i32', [1], [77])],
    { scale: 0.1, valueDim: 64, precision: 'bf16' },
    { ...rough(), gradient: false },
  ),
  ...precisions.map(precision =>
    opCase(
      'latentAttention',
      `a bf16 cache, ${precision}`,
      [f32(2, 2, 8, 80), { ...f32(2, 90, 80), dtype: 'bf16' }, given('i32', [2], [77, 40])],
      { scale: 0.1, valueDim: 64, precision },
      { ...(precision === 'bf16' ? rough() : sum), gradient: false },
    ),
  ),
  // GLM-4.7-Flash: 20 heads are no multiple of any tile.
  ...precisions.flatMap(precision =>
    (['f32', 'bf16'] as const).map(dtype =>
      opCase(
        'latentAttention',
        `20 heads over latents of 576, ${dtype === 'f32' ? 'an f32' : 'a bf16'} cache, ${precision}`,
        [f32(1, 1, 20, 576), { ...f32(1, 40, 576), dtype }, given('i32', [1], [37])],
        { scale: 0.0625, valueDim: 512, precision },
        { ...(precision === 'bf16' ? rough() : sum), gradient: false },
      ),
    ),
  ),
  ...pagedCases,
  ...indexCases,
  opCase(
    'indexScores',
    'products of zero, NaN and infinity',
    [
      given('f32', [1, 3, 2, 2], [0, 0, 1, -1, Number.NaN, 0, 1, 1, 1, 0, -1, Number.POSITIVE_INFINITY]),
      f32(1, 3, 2),
      given('f32', [1, 3, 2], [1, 1, 0, 0, -1, 2]),
    ],
    { precision: 'f32' },
    { gradient: false },
  ),
  opCase(
    'indexScoresBackward',
    'limits, products of zero',
    [
      given('f32', [1, 2, 2, 2], [1, 1, 0, 0, -1, 1, 2, -2]),
      f32(1, 2, 2),
      given('f32', [1, 3, 2], [1, 1, 0.5, -0.5, -1, 2]),
      f32(1, 2, 3),
      given('i32', [1, 2], [2, 3]),
    ],
    { precision: 'f32' },
    { ...sum, gradient: false },
  ),
]
