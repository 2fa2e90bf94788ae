/** @file The few global settings: default backend, recording, precision, and counts of fallbacks. */
import type { Backend, FusedName, Precision, WidePrecision } from './backend.ts'
import { describe, isMoeError, MoeError, needFunction, shown } from './errors.ts'
import { checkOptions } from './options.ts'
import type { Tensor } from './tensor.ts'

interface Context {
  backend: Backend | null
  recording: boolean
  recomputing: boolean
  /** Values that `cacheForRecompute` returned in the running `checkpoint`, for its second run. */
  cachedValues: unknown[] | null
  /** In that second run: the values of the first run that are still to be returned. */
  replayedValues: Iterator<unknown> | null
  /** Tensors that `withRecomputed` will free, and reshapes of them. */
  discardable: Set<Tensor> | null
  precision: Precision
  /** How often a fused op ran as its decomposition, by `backend:op`. */
  fallbacks: Map<string, number>
}

/** The state of the whole process. Internal. */
export const context: Context = {
  backend: null,
  recording: true,
  recomputing: false,
  cachedValues: null,
  replayedValues: null,
  discardable: null,
  precision: 'f32',
  fallbacks: new Map(),
}

/**
 * Sets the backend on which creation functions put their tensors.
 * @throws MoeError E_ATTR if it is not a backend, for example a promise of one
 */
export function setDefaultBackend(backend: Backend): void {
  checkBackend('setDefaultBackend', backend)
  context.backend = backend
}

/** Checks that a caller passed a backend, and not a promise of one. Internal. @throws MoeError E_ATTR */
export function checkBackend(op: string, backend: Backend): void {
  if (backend?.primitives !== undefined) return
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: `the backend is ${describe(backend)}`,
    fix: "pass an awaited backend: await firstAvailable([() => import('@moe/kernels-cpu')])",
  })
}

/** Returns the backend set by `setDefaultBackend`. @throws MoeError E_NO_BACKEND if none was set */
export function defaultBackend(): Backend {
  if (context.backend === null) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: 'defaultBackend',
      problem: 'no default backend is set',
      fix: "call setDefaultBackend(await firstAvailable([() => import('@moe/kernels-cpu'), () => import('@moe/backend-tfjs')])) first",
    })
  }
  return context.backend
}

/** The exports of a backend package that `firstAvailable` uses. */
export interface BackendModule {
  /**
   * Opens the backend.
   * @throws MoeError E_NO_BACKEND if its device or library is missing, E_UNSUPPORTED if it cannot run on this machine
   */
  createBackend(): Promise<Backend>
}

/**
 * Returns the first backend of the list that loads and finds its device. Skips packages that are not installed and
 * backends that throw E_NO_BACKEND or E_UNSUPPORTED, and passes the reason to `onSkip`.
 * @throws MoeError E_NO_BACKEND with all reasons if none works, E_ATTR if `loaders` is not a list of functions
 */
export async function firstAvailable(
  loaders: ReadonlyArray<() => Promise<BackendModule>>,
  options: { onSkip?: (reason: string) => void } = {},
): Promise<Backend> {
  checkOptions('firstAvailable', options, { onSkip: true })
  if (!Array.isArray(loaders) || loaders.some(load => typeof load !== 'function')) {
    throw new MoeError({
      code: 'E_ATTR',
      op: 'firstAvailable',
      problem: `the loaders are ${Array.isArray(loaders) ? shown(loaders) : describe(loaders)}, not a list of functions`,
      fix: "pass functions that import a backend: firstAvailable([() => import('@moe/kernels-cpu')])",
    })
  }
  const reasons: string[] = []
  for (const load of loaders) {
    try {
      const module = await load()
      return await module.createBackend()
    } catch (error) {
      const missing = (error as { code?: string }).code === 'ERR_MODULE_NOT_FOUND'
      if (!missing && !isMoeError(error, 'E_NO_BACKEND') && !isMoeError(error, 'E_UNSUPPORTED')) throw error
      const reason = error instanceof Error ? error.message : String(error)
      reasons.push(reason)
      options.onSkip?.(reason)
    }
  }
  throw new MoeError({
    code: 'E_NO_BACKEND',
    op: 'firstAvailable',
    problem:
      reasons.length === 0
        ? 'the list of backends is empty'
        : `no backend could be used:\n${reasons.map(reason => `  - ${reason}`).join('\n')}\n`,
    fix:
      reasons.length === 0
        ? "pass at least one: [() => import('@moe/kernels-cpu')]"
        : 'install one of them, or fix the first reason',
  })
}

/** A setting ends when its function returns, so asynchronous work would run without it. */
function synchronous<T>(op: string, result: T): T {
  if (!(result instanceof Promise)) return result
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: 'the function returned a promise, but the setting ends before it settles',
    fix: 'pass a synchronous function and await its result outside',
  })
}

/** Runs a synchronous function without recording its ops for `backward`. */
export function noGrad<T>(fn: () => T): T {
  needFunction('noGrad', fn)
  const before = context.recording
  context.recording = false
  try {
    return synchronous('noGrad', fn())
  } finally {
    context.recording = before
  }
}

/** Returns whether ops are being recorded for `backward`. */
export const isRecording = (): boolean => context.recording

/** Returns whether a forward pass is being repeated by `checkpoint`. Counters must not count it again. */
export const isRecomputing = (): boolean => context.recomputing

/**
 * Returns `make()`, and the same value again when `checkpoint` repeats the forward pass. For values that depend on
 * state other than tensors, for example numbers from a random stream that advances.
 */
export function cacheForRecompute<T>(make: () => T): T {
  const replayed = context.replayedValues?.next()
  const value = replayed === undefined || replayed.done ? make() : (replayed.value as T)
  context.cachedValues?.push(value)
  return value
}

/** The precisions that `withPrecision` accepts. */
export const precisions: readonly Precision[] = ['f32', 'bf16', 'fp8']

/**
 * Checks a precision that is stored for later use.
 * @throws MoeError E_ATTR if it is unknown
 * @internal
 */
export function checkPrecision(op: string, precision: Precision): void {
  if (precisions.includes(precision)) return
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: `unknown precision ${JSON.stringify(precision)}`,
    fix: "pass 'f32', 'bf16' or 'fp8'",
  })
}

/**
 * Runs a synchronous function with matrix products in the given precision; accumulation stays f32. Parameters,
 * optimizer state and everything else stay f32. A backend without bf16 arithmetic multiplies in f32.
 *
 * 'fp8' applies to linear layers, experts and their backward passes; attention, batched products and the loss of the
 * output head then run in bf16 (DeepSeek-V3 report 3.3).
 * @throws MoeError E_ATTR for an unknown precision
 */
export function withPrecision<T>(precision: Precision, fn: () => T): T {
  checkPrecision('withPrecision', precision)
  needFunction('withPrecision', fn)
  const before = context.precision
  context.precision = precision
  try {
    return synchronous('withPrecision', fn())
  } finally {
    context.precision = before
  }
}

/** Returns the current precision of matrix products. */
export const currentPrecision = (): Precision => context.precision

/** Returns the precision for products that never run in fp8: bf16 in its place. */
export const widePrecision = (precision: Precision = context.precision): WidePrecision =>
  precision === 'fp8' ? 'bf16' : precision

/** A fused op that ran without a kernel. */
export interface Fallback {
  /** `Backend.name`. */
  readonly backend: string
  /** The op that was decomposed. */
  readonly op: FusedName
  /** Number of calls since the process started. */
  readonly count: number
}

/**
 * Returns the fused ops that ran as their decomposition so far, most frequent first. Fallbacks are slower, but compute
 * the same result.
 */
export function fallbacks(): Fallback[] {
  return [...context.fallbacks]
    .map(([key, count]) => {
      const split = key.lastIndexOf(':')
      return { backend: key.slice(0, split), op: key.slice(split + 1) as FusedName, count }
    })
    .sort((a, b) => b.count - a.count)
}
