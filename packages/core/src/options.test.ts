import { describe, expect, test } from 'vitest'
import { checkOptions, checkShared, type OptionNames } from './options.ts'

interface Options {
  readonly steps: number
  readonly warmup?: number
  readonly lr?: number
}
const names: OptionNames<Options> = { steps: true, warmup: true, lr: true }
const check = (options: unknown) => checkOptions('train', options as Options, names)
const config = (given: object) => checkShared('Layer', given, { hidden_size: true, v_head_dim: true, n_group: true })

describe('checkOptions', () => {
  test('accepts known names and undefined values', () => {
    check({})
    check({ steps: 1, warmup: undefined, lr: 0 })
    check({ steps: 1, typo: undefined })
  })

  test.each([
    ['step', 'steps'],
    ['setps', 'steps'],
    ['Warmup', 'warmup'],
    ['warm_up', 'warmup'],
    ['wormop', 'warmup'],
    ['l', 'lr'],
  ])('%s suggests %s', (name, near) => {
    expect(() => check({ steps: 1, [name]: null })).toThrow(`train: unknown option ${name}; did you mean ${near}?`)
  })

  test('lists all names if none is close', () => {
    expect(() => check({ learningRate: 1 })).toThrow(
      expect.objectContaining({
        code: 'E_CONFIG',
        message: 'train: unknown option learningRate; known options are steps, warmup, lr',
        details: { name: 'learningRate', known: ['steps', 'warmup', 'lr'] },
      }),
    )
  })

  test('does not accept names of Object.prototype, and checks inherited names', () => {
    expect(() => check({ toString: () => '' })).toThrow('unknown option toString')
    expect(() => check(Object.create({ stepz: 1 }))).toThrow('did you mean steps?')
  })

  test.each([
    [null, 'null'],
    [undefined, 'undefined'],
    ['fast', 'the string "fast"'],
    [() => {}, 'a function'],
  ])('rejects %s', (value, words) => {
    expect(() => check(value)).toThrow(`train: expected an options object, got ${words}`)
    expect(() => check(value)).toThrow('pass an object: { steps, warmup, lr }')
  })

  test('lists of names must match the type', () => {
    // @ts-expect-error lr is missing
    checkOptions<Options>('train', { steps: 1 }, { steps: true, warmup: true })
    // @ts-expect-error rate does not exist
    checkOptions<Options>('train', { steps: 1 }, { steps: true, warmup: true, lr: true, rate: true })
  })
})

describe('checkShared', () => {
  test("rejects other model families' names of known options", () => {
    for (const name of ['d_model', 'n_embd', 'dim'])
      expect(() => config({ hidden_size: 8, [name]: 9 })).toThrow(
        `Layer: unknown option ${name}; did you mean hidden_size?`,
      )
    expect(() => config({ n_expert_groups: 2 })).toThrow('did you mean n_group?')
    config({ hidden_size: 8, d_model: undefined, num_layers: 4, top_k: 50 })
  })

  test("accepts other programs' names, even similar ones", () => {
    config({ hidden_size: 8, torch_dtype: 'float32', head_dim: 64, sliding_window: null })
  })

  test.each([
    ['hidden_sise', 'hidden_size'],
    ['hiddensize', 'hidden_size'],
    ['hiddenSize', 'hidden_size'],
    ['hiden_size', 'hidden_size'],
    ['hidden_sizes', 'hidden_size'],
    ['n_gruop', 'n_group'],
  ])('rejects %s for %s', (name, near) => {
    expect(() => config({ hidden_size: 8, [name]: 9 })).toThrow(`Layer: unknown option ${name}; did you mean ${near}?`)
  })

  test('rejects what is not an object', () => {
    expect(() => config(undefined as never)).toThrow(
      'Layer: expected an options object, got undefined; pass an object: { hidden_size, v_head_dim, n_group }',
    )
  })
})
