import { expect, test } from 'vitest'
import { type ShotOptions, Shots } from './shots.ts'

const items = Array.from({ length: 20 }, (_, i) => ({
  fields: { i, group: i % 2 ? 'odd' : 'even' },
  location: `file:${i}`,
}))
const numbers = (shots: Shots, item: number) => shots.of(items[item], item).map(({ fields }) => fields.i as number)
const make = (options: Partial<ShotOptions> = {}) =>
  new Shots({ shots: 5, draw: 'each', seed: 0, pool: items, groupOf: () => '', ...options })

test('draw each: examples are drawn for each item from the seed, without the item itself', () => {
  const shots = make()
  const drawn = items.map((_, i) => numbers(shots, i))
  expect(drawn).toEqual(items.map((_, i) => numbers(make(), i)))
  expect(numbers(make({ seed: 1 }), 0)).not.toEqual(drawn[0])
  for (const [i, examples] of drawn.entries()) {
    expect(examples).not.toContain(i)
    expect(new Set(examples).size).toBe(5)
  }
  expect(new Set(drawn.map(String)).size).toBe(20)
  // Among the 100 drawn, each of the 20 occurs.
  expect(new Set(drawn.flat()).size).toBe(20)
})

test('draw once: the same examples are drawn for all items, without the item itself', () => {
  const shots = make({ draw: 'once' })
  const drawn = items.map((_, i) => numbers(shots, i))
  const counts = new Map<string, number>()
  for (const examples of drawn) counts.set(`${examples}`, (counts.get(`${examples}`) ?? 0) + 1)
  // The five examples themselves get others.
  expect(Math.max(...counts.values())).toBe(15)
  for (const [i, examples] of drawn.entries()) expect(examples).not.toContain(i)
})

test('draw first: examples are the first of the pool, without the item itself', () => {
  expect(numbers(make({ draw: 'first' }), 9)).toEqual([0, 1, 2, 3, 4])
  expect(numbers(make({ draw: 'first' }), 2)).toEqual([0, 1, 3, 4, 5])
})

test('examples are of the same group', () => {
  const shots = make({ groupOf: ({ fields }) => fields.group as string })
  for (let i = 0; i < 20; i++) expect(numbers(shots, i).every(one => one % 2 === i % 2)).toBe(true)
})

test('an item that is also in the pool is recognized by its location', () => {
  const pool = items.slice(0, 6).map(({ fields, location }) => ({ fields: { ...fields }, location }))
  for (const draw of ['each', 'once', 'first'] as const)
    for (let i = 0; i < 6; i++) expect(numbers(make({ pool, draw }), i)).not.toContain(i)
})

test('an item that is twice in the pool is left out twice', () => {
  const pool = [items[0], items[1], items[0], items[2]]
  for (let seed = 0; seed < 10; seed++) expect(numbers(make({ pool, seed, shots: 2 }), 0).toSorted()).toEqual([1, 2])
})

test('only as many items are looked at as are drawn', () => {
  let looks = 0
  const pool = Array.from({ length: 1000 }, (_, i) => ({
    fields: { i },
    get location() {
      looks++
      return `pool:${i}`
    },
  }))
  const shots = make({ pool })
  for (let i = 0; i < 20; i++) expect(numbers(shots, i)).toHaveLength(5)
  expect(looks).toBe(20 * 5)
})

test('too few examples are an error', () => {
  const pool = items.slice(0, 5)
  expect(() => numbers(make({ pool }), 0)).toThrow('file:0: shots is 5, but there are only 4 other items')
  expect(numbers(make({ pool }), 7)).toHaveLength(5)
  const groupOf = () => 'law'
  expect(() => numbers(make({ pool, groupOf }), 1)).toThrow(
    'only 4 other items in the group law; pass examples, or fewer shots',
  )
})
