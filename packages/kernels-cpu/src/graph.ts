/** @file Graphs: the recorded kernel calls of a function, replayed as a single call into native code. */
import { type CaptureOptions, type Graph, MoeError } from '@moe/core'
import { failure, type NativeLibrary } from './load.ts'
import type { CpuBuffer, Memory } from './memory.ts'
import type { Native } from './native.ts'
import { counterOf, profiling } from './profile.ts'
import { type Call, Recording } from './recording.ts'

/** Captures the kernel calls of `fn`: see `Backend.capture`. `setRecording` sets where `native` records them; null ends it. */
export function capture<T>(
  library: NativeLibrary,
  memory: Memory,
  native: Native,
  fn: () => T,
  options: CaptureOptions,
  setRecording: (recording: Recording | null) => void,
): Graph<T> {
  const recording = new Recording()
  const { calls, buffers } = recording
  const pool = memory.newPool()
  const state = [...new Set(options.state)]
  const before = state.map(tensor => tensor.handle as CpuBuffer)
  const copy = native.kernel('moe_copy')
  const releaseAll = () => {
    for (const buffer of buffers) if (buffer.refs > 0) memory.release(buffer)
    memory.dissolve(pool)
  }

  setRecording(recording)
  let result: T
  try {
    result = memory.within(pool, () => {
      // No kernel has run, so without the copies the state has its old contents.
      const restoreState = (copies: boolean) => {
        const changed = state.flatMap((tensor, i) => {
          // Null if `fn` freed the value and failed before replacing it.
          const now = tensor.handle as CpuBuffer | null
          return now === before[i] ? [] : [{ tensor, old: before[i], now }]
        })
        if (copies) {
          // A value in the memory of other state, such as one of two that were swapped, is copied before it is overwritten.
          for (const change of changed) {
            const { tensor, now } = change
            if (now === null || !before.includes(now)) continue
            tensor.handle = change.now = memory.allocate(now.bytes)
            copy(change.now.pointer, now.pointer, now.bytes)
            memory.release(now)
          }
          for (const { old, now } of changed) {
            if (now === null) continue
            copy(old.pointer, now.pointer, now.bytes)
            native.updateRoundedCopy(old)
          }
        }
        for (const { tensor, old, now } of changed) {
          if (now) memory.release(now)
          tensor.handle = memory.revive(old)
        }
      }
      try {
        const value = fn()
        if (value instanceof Promise) throw asynchronous()
        memory.begin()
        restoreState(true)
        return value
      } catch (cause) {
        restoreState(false)
        throw cause
      }
    })
  } catch (cause) {
    releaseAll()
    throw cause
  } finally {
    setRecording(null)
  }

  // All slots in one array; and for each call the addresses of its kernel and of its slots.
  const slots = new Float64Array(calls.reduce((sum, call) => sum + call.slots.length, 0))
  const pairs = new Float64Array(2 * calls.length)
  const slotsAddress = library.address(slots.buffer)
  const starts = new Uint32Array(calls.length)
  let at = 0
  calls.forEach((call, i) => {
    starts[i] = at
    slots.set(call.slots, at)
    pairs[2 * i] = library.entryAddress(call.name)
    pairs[2 * i + 1] = slotsAddress + at * 8
    at += call.slots.length
  })

  const varying = calls.map((call, i) => ({ slot: call.varying, end: starts[i] + call.slots.length }))
  const update = (updates: object) => {
    for (const { slot, end } of varying) {
      if (slot === null) continue
      const change = (updates as Record<string, ((attrs: unknown) => unknown) | undefined>)[slot.op]
      if (change === undefined) continue
      slot.attrs = change(slot.attrs)
      slots.set(slot.encode(slot.attrs as never), end - slot.count)
    }
  }

  let alive = true
  return {
    result,
    nodes: calls.length,
    replay(updates) {
      if (!alive) throw new MoeError({ code: 'E_DISPOSED', op: 'replay', problem: 'the graph has been disposed' })
      memory.needAlive()
      if (updates !== undefined) update(updates)
      if (profiling.on) return replayProfiled(library, calls, starts, slotsAddress)
      const status = library.replay(library.address(pairs.buffer), calls.length)
      if (status !== 0) throw failure(library, calls[(status >> 2) - 1].name, status & 3)
    },
    dispose() {
      if (!alive) return
      alive = false
      releaseAll()
    },
  }
}

/** Replays call by call to time each one. */
function replayProfiled(library: NativeLibrary, calls: readonly Call[], starts: Uint32Array, slots: number): void {
  calls.forEach(({ name, entry }, i) => {
    const counter = counterOf(name)
    const started = performance.now()
    const status = entry(slots + starts[i] * 8)
    if (status !== 0) throw failure(library, name, status)
    counter.milliseconds += performance.now() - started
    counter.calls++
  })
}

function asynchronous(): MoeError {
  return new MoeError({
    code: 'E_ATTR',
    op: 'capture',
    problem: 'the captured function returned a promise',
    fix: 'capture a synchronous function, and read results after replay',
  })
}
