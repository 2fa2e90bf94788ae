/** @file Computations of the page that do not need a browser. */
import { describe, expect, test } from 'vitest'

const page = (name: string) => import(new URL(`../../page/${name}`, import.meta.url).href)
const { centred, colorOf, shadeOfBias, shadeOfShare, shares, summaryOf } = await page('loads.js')
const { joined, wanted } = await page('zoom.js')

test('titles of logged values are the source for held-out data, and the name otherwise', async () => {
  const { titleOfLogged } = await page('numbers.js')
  const heldOut = (title: string, unit: string) => ({ group: 'Held-out sources', title, unit })
  expect(titleOfLogged('validation/web/loss')).toEqual(heldOut('web', 'nats per token'))
  expect(titleOfLogged('validation/code/rust/bitsPerByte')).toEqual(heldOut('code/rust', 'bits per byte'))
  for (const title of ['accuracy', 'validation/accuracy', 'tasks/validation/web/loss'])
    expect(titleOfLogged(title)).toEqual({ group: 'Logged', title, unit: '' })
})

test('the held-out loss of pairs is shown as their preference loss, and not as a loss per token', async () => {
  const { heldOut } = await page('numbers.js')
  const of = (evaluation: object) => ['loss', 'preference', 'preferred'].map(name => heldOut(evaluation, name))
  expect(of({ loss: 0.5, preferred: 1 })).toEqual([undefined, 0.5, 1])
  expect(of({ loss: 2 })).toEqual([2, undefined, undefined])
})

describe('the loads of experts', () => {
  test('are shown as shares of the mean, with a shade for each power of two', () => {
    expect(shares([0, 1, 2, 5])).toEqual([0, 0.5, 1, 2.5])
    expect(shares([0, 0])).toEqual([0, 0])
    const expected = [
      [0, null],
      [1, 0],
      [2, 0.5],
      [0.5, -0.5],
      [4, 1],
      [0.25, -1],
      [64, 1],
      [0.01, -1],
    ]
    for (const [share, shade] of expected) expect(shadeOfShare(share)).toBe(shade)
    expect([-2, 0, 1].map(bias => shadeOfBias(bias, 2))).toEqual([-1, 0, 0.5])
    expect(shadeOfBias(0, 0)).toBe(0)
    expect(centred([3, 4, 8])).toEqual([-2, -1, 3])
  })

  test('have colours interpolated between low, middle and high', () => {
    const scale = { low: [0, 0, 100], middle: [200, 200, 200], high: [100, 0, 0] }
    expect([-1, -0.5, 0, 1].map(shade => colorOf(shade, scale))).toEqual([
      'rgb(0 0 100)',
      'rgb(100 100 150)',
      'rgb(200 200 200)',
      'rgb(100 0 0)',
    ])
  })

  test('are summarized', () => {
    expect(summaryOf({ load: [0, 6, 2, 0], dropped: 2, bias: [0.5, -1, 0, 0] })).toEqual({
      maxVio: 2,
      busiest: 1,
      idlest: 0,
      least: 0,
      dead: [0, 3],
      dropped: 0.25,
      bias: [-1, 0.5],
    })
    expect(summaryOf({ load: [1, 1] })).toMatchObject({ maxVio: 0, dead: [], dropped: null, bias: null })
  })
})

describe('zooming', () => {
  const column = (values: Array<number | null>, wide = true) => ({
    mean: values,
    ...(wide && { min: values.map(value => value && value - 1), max: values.map(value => value && value + 1) }),
  })
  const series = (steps: number[], wide = true) => ({
    steps,
    columns: new Map([
      [
        'nll',
        column(
          steps.map(step => step / 10),
          wide,
        ),
      ],
      [
        'tokens',
        column(
          steps.map(step => 100 * step),
          wide,
        ),
      ],
    ]),
  })
  const whole = series([1, 10, 20, 30, 40, 45])

  test('requests the steps of a range if it has more lines, and pixels, than points', () => {
    const of = (range: number[] | null, across = 'step', pixels = 300) => wanted(whole, { range, across }, pixels)
    expect(of(null)).toBe(undefined)
    expect(of([9.5, 31.2])).toEqual([9, 32])
    expect(of([-3, 12])).toEqual([0, 12])
    expect(of([9.5, 31.2], 'step', 3)).toBe(undefined)
    expect(of([9.5, 31.2], 'step', 4)).toEqual([9, 32])
    // Steps are requested as they are; a range of tokens extends to the points around it.
    expect(of([21, 22])).toEqual([21, 22])
    expect(of([1500, 3100], 'tokens')).toEqual([10, 40])
    expect(of([2100, 2200], 'tokens')).toEqual([20, 30])
    expect(of([9000, 9100], 'tokens')).toEqual([45, 45])
    expect(wanted(series([1, 2, 3], false), { range: [1, 2], across: 'step' }, 300)).toBe(undefined)
  })

  test('replaces the points of the range by the requested lines', () => {
    const part = series([18, 19, 20, 21, 22], false)
    const { steps, columns } = joined(whole, part)
    expect(steps).toEqual([1, 10, 18, 19, 20, 21, 22, 30, 40, 45])
    expect(columns.get('nll')).toEqual({
      mean: [0.1, 1, 1.8, 1.9, 2, 2.1, 2.2, 3, 4, 4.5],
      min: [-0.9, 0, 1.8, 1.9, 2, 2.1, 2.2, 2, 3, 3.5],
      max: [1.1, 2, 1.8, 1.9, 2, 2.1, 2.2, 4, 5, 5.5],
    })
    expect(joined(whole, series([44, 45, 46])).steps).toEqual([1, 10, 20, 30, 40, 44, 45, 46])
    expect(joined(whole, series([]))).toBe(whole)
    const { columns: without } = joined(whole, { steps: [20], columns: new Map() })
    expect(without.get('nll').mean).toEqual([0.1, 1, null, 3, 4, 4.5])
  })
})
