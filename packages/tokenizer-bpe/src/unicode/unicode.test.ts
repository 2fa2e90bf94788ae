/** @file Compares the classes derived from this runtime's regular expressions with the table. */
import { expect, test, vi } from 'vitest'
import { classOf, isFilled } from './classes.ts'
import { fillFromEngine } from './engine-classes.ts'
import { fillFromTable } from './pinned-classes.ts'

test("the classes derived from the engine's regular expressions equal those of the table", () => {
  fillFromTable()
  const pinned = classOf.slice()
  classOf.fill(0, 0x80)
  const isKnown = fillFromEngine()
  // Node 20 to 24 have Unicode 15.0 to 17.0.
  expect(isKnown).toBe(true)
  expect(classOf).toEqual(pinned)
})

test('an engine with one more letter is detected', () => {
  const original = String.fromCodePoint
  const spy = vi.spyOn(String, 'fromCodePoint')
  spy.mockImplementation((...codes) => original(...codes.map(code => (code === 0x0378 ? 0x4e00 : code))))
  expect(fillFromEngine()).toBe(false)
  spy.mockRestore()
  expect(isFilled()).toBe(false)
  fillFromTable()
  expect(isFilled()).toBe(true)
})
