/** @file Graph capture: records the work of a function once and launches it again as one CUDA graph. */
import { type CaptureOptions, type Graph, MoeError, type OpAttrs, type OpName } from '@moe/core'
import type { Context } from './driver/context.ts'
import type { Driver } from './driver/driver.ts'
import { type CudaBuffer, type Memory, newPool, type Pool } from './memory.ts'
import type { Stream } from './stream.ts'

/** Attributes stored in device memory, so that a replay can change them. */
interface DeviceAttrs {
  readonly op: OpName
  /** Identifies the captured values. */
  readonly key: string
  attrs: unknown
  readonly pointer: number
  readonly encode: (attrs: never) => readonly number[]
}

/** A capture in progress. */
export interface Recording {
  readonly pool: Pool
  /** Constants uploaded during the capture: written when it ends, and then kept. */
  readonly uploads: Array<{ readonly pointer: number; readonly data: Uint8Array }>
  readonly attrs: DeviceAttrs[]
  /** Buffers that the graph owns until it is disposed. */
  readonly buffers: CudaBuffer[]
}

/** Nothing else may use the stream during a capture, but other threads may call the driver. */
export const captureRelaxed = 2

export function capture<T>(
  driver: Driver,
  context: Context,
  memory: Memory,
  stream: Stream,
  fn: () => T,
  options: CaptureOptions,
  setRecording: (recording: Recording | null) => void,
): Graph<T> {
  if (memory.guarded) throw guarded()
  const { call } = driver
  const recording: Recording = { pool: newPool(), uploads: [], attrs: [], buffers: [] }
  const state = [...new Set(options.state)]
  const before = state.map(tensor => tensor.handle as CudaBuffer)

  memory.allChanged()
  driver.check(call.cuStreamBeginCapture(stream.handle, captureRelaxed), 'capture')
  setRecording(recording)
  let result: T
  let failure: { readonly cause: unknown } | null = null
  try {
    result = memory.within(recording.pool, () => {
      // No kernel has run, so without the copies the state has its old contents.
      const putBack = (copy: boolean) => {
        const changed = state.flatMap((tensor, i) => {
          // Null if `fn` freed the value and failed before replacing it.
          const now = tensor.handle as CudaBuffer | null
          return now === before[i] ? [] : [{ tensor, old: before[i], now }]
        })
        if (copy) {
          // A value in the memory of other state, such as one of two that were swapped, is copied before it is overwritten.
          for (const change of changed) {
            const { tensor, now } = change
            if (now === null || !before.includes(now)) continue
            tensor.handle = change.now = memory.allocate(now.bytes)
            stream.copy(change.now.pointer, now.pointer, now.bytes)
            memory.release(now)
          }
          for (const { old, now } of changed) if (now) stream.copy(old.pointer, now.pointer, now.bytes)
        }
        for (const { tensor, old, now } of changed) {
          if (now) memory.release(now)
          tensor.handle = memory.revive(old)
        }
      }
      try {
        const value = fn()
        if (value instanceof Promise) throw asynchronous()
        memory.begin('capture')
        putBack(true)
        return value
      } catch (cause) {
        putBack(false)
        throw cause
      }
    })
  } catch (cause) {
    failure = { cause }
  } finally {
    setRecording(null)
    memory.allChanged()
  }
  const word = new BigUint64Array(1)
  const ended = call.cuStreamEndCapture(stream.handle, word)
  const graph = Number(word[0])
  const giveUp = () => {
    if (graph !== 0) call.cuGraphDestroy(graph)
    for (const buffer of recording.buffers) if (buffer.refs > 0) memory.release(buffer)
    memory.dissolve(recording.pool)
  }
  if (failure !== null) {
    giveUp()
    throw failure.cause
  }
  let exec: number
  let nodes: number
  try {
    driver.check(ended, 'capture', 'ending the recording')
    const count = new BigUint64Array(1)
    driver.check(call.cuGraphGetNodes(graph, 0, count), 'capture')
    nodes = Number(count[0])
    exec = driver.out(pointer => call.cuGraphInstantiate(pointer, graph, 0), 'capture', `of ${nodes} nodes`)
  } catch (cause) {
    giveUp()
    throw cause
  }
  for (const { pointer, data } of recording.uploads) stream.upload(pointer, data, 'capture')
  for (const slot of recording.attrs) writeAttrs(stream, slot)

  let alive = true
  return {
    // Always assigned if `failure` is null.
    result: result! as T,
    nodes,
    replay(updates = {}) {
      if (!alive) throw new MoeError({ code: 'E_DISPOSED', op: 'replay', problem: 'the graph has been disposed' })
      context.use()
      for (const slot of recording.attrs) {
        const update = updates[slot.op] as ((attrs: unknown) => unknown) | undefined
        if (update === undefined) continue
        slot.attrs = update(slot.attrs)
        writeAttrs(stream, slot)
      }
      memory.allChanged()
      driver.check(call.cuGraphLaunch(exec, stream.handle), 'replay', `of ${nodes} nodes`)
    },
    dispose() {
      if (!alive) return
      alive = false
      // The graph was destroyed with the backend.
      if (!context.open) return
      context.use()
      call.cuGraphExecDestroy(exec)
      giveUp()
    },
  }
}

/** Address of the attributes for the graph. Calls with equal attributes share it: an optimizer makes one call per parameter. */
export function recordedAttrs<O extends OpName>(
  recording: Recording,
  memory: Memory,
  op: O,
  attrs: OpAttrs[O],
  encode: (attrs: OpAttrs[O]) => readonly number[],
): number {
  const values = encode(attrs)
  const key = `${op} ${values}`
  const known = recording.attrs.find(slot => slot.key === key)
  if (known !== undefined) return known.pointer
  const buffer = memory.allocateConstant(values.length * 4)
  recording.buffers.push(buffer)
  recording.attrs.push({ op, key, attrs, pointer: buffer.pointer, encode })
  return buffer.pointer
}

function writeAttrs(stream: Stream, { op, attrs, pointer, encode }: DeviceAttrs): void {
  stream.upload(pointer, Float32Array.from(encode(attrs as never)), op)
}

/** Stream-ordered allocations and frees would become part of the graph, which may only free its own allocations. */
function guarded(): MoeError {
  return new MoeError({
    code: 'E_UNSUPPORTED',
    op: 'capture',
    problem: 'with `guarded`, buffers are allocated on the stream, and a graph would capture these allocations',
    fix: 'create the backend without `guarded`',
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
