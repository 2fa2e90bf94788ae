import { afterEach, expect, test } from 'vitest'
import { yieldToEventLoop } from './turns.ts'

const { setImmediate } = globalThis
afterEach(() => {
  globalThis.setImmediate = setImmediate
})

test.each([true, false])('yieldToEventLoop lets timers run, with setImmediate: %s', async available => {
  if (!available) Reflect.deleteProperty(globalThis, 'setImmediate')
  let fired = false
  setTimeout(() => {
    fired = true
  })
  for (let turns = 0; !fired; turns++) {
    if (turns === 1e6) break
    await yieldToEventLoop()
  }
  expect(fired).toBe(true)
})
