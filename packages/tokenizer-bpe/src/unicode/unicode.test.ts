/** @file The classes of code points from this runtime's regular expressions against the table. */
import { expect, test, vi } from 'vitest'
import { classOf, isFilled } from './classes.ts'
import { askEngine } from './engine-classes.ts'
import { fillClasses } from './pinned-classes.ts'

test('the engine, put right, says what the table says, or knows that it does not', () => {
  fillClasses()
  const pinned = classOf.slice()
  classOf.fill(0, 0x80)
  const known = askEngine()
  // Node 20 to 24 are of Unicode 15.0 to 17.0.
  expect(known).toBe(true)
  expect(classOf).toEqual(pinned)
})

test('an engine that has one letter more is found out', () => {
  const original = String.fromCodePoint
  const spy = vi.spyOn(String, 'fromCodePoint')
  spy.mockImplementation((...codes) => original(...codes.map(code => (code === 0x0378 ? 0x4e00 : code))))
  expect(askEngine()).toBe(false)
  spy.mockRestore()
  expect(isFilled()).toBe(false)
  fillClasses()
  expect(isFilled()).toBe(true)
})
