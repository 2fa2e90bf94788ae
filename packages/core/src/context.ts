/** @file The few settings that are not arguments: default backend, recording, precision policy, and what fell back. */
import type { Backend, FusedName, Precision, WidePrecision } from './backend.ts'
import { describe, isMoeError, MoeError, shown } from './errors.ts'
import { checkOptions } from './options.ts'
import type { Tensor } from './tensor.ts'

interface Context {
  backend: Backend | null
  recording: boolean
  recomputing: boolean
  /** What `remember` gave inside the running `checkpoint`, for its second run. */
  remembered: unknown[] | null
  /** In that second run: what is still to be given. */
  recalled: Iterator<unknown> | null
  /** Tensors that `withRecomputed` is going to free, and their reshapes. */
  lent: Set<Tensor> | null
  precision: Precision
  /** Times that a fused op ran as its decomposition, by `backend:op`. */
  fallbacks: Map<string, number>
}

/** Internal. Shared by everything that runs; a process has one. */
export const context: Context = {
  backend: null,
  recording: true,
  recomputing: false,
  remembered: null,
  recalled: null,
  lent: null,
  precision: 'f32',
  fallbacks: new Map(),
}

/** The backend on which creation functions put their tensors. @throws MoeError E_ATTR for what is none, such as a promise of one. */
export function setDefaultBackend(backend: Backend): void {
  if (backend?.primitives === undefined) {
    throw new MoeError({
      code: 'E_ATTR',
      op: 'setDefaultBackend',
      problem: `the backend is ${describe(backend)}`,
      fix: "pass what was awaited: setDefaultBackend(await firstAvailable([() => import('@moe/kernels-cpu')]))",
    })
  }
  context.backend = backend
}

/** @throws MoeError E_NO_BACKEND when none was set. */
export function defaultBackend(): Backend {
  if (context.backend === null) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: 'defaultBackend',
      problem: 'no backend was chosen',
      fix: "call setDefaultBackend(await firstAvailable([() => import('@moe/kernels-cpu'), () => import('@moe/backend-tfjs')])) first",
    })
  }
  return context.backend
}

/** What a backend package exports for `firstAvailable`. */
export interface BackendModule {
  /** Opens the backend. @throws MoeError E_NO_BACKEND when its device or library is not there, E_UNSUPPORTED when this machine cannot run it. */
  createBackend(): Promise<Backend>
}

/**
 * The first backend of the list that loads and finds its device. A module that is not installed or says E_NO_BACKEND or
 * E_UNSUPPORTED is passed over; `onSkip` is given the reason.
 * @throws MoeError E_NO_BACKEND with every reason when none works, E_ATTR for what is no list of functions.
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
      problem: `the loaders are ${Array.isArray(loaders) ? shown(loaders) : describe(loaders)}, no list of functions`,
      fix: "pass what imports each: firstAvailable([() => import('@moe/kernels-cpu')])",
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
        ? 'the list is empty'
        : `no backend could be used:\n${reasons.map(reason => `  - ${reason}`).join('\n')}\n`,
    fix:
      reasons.length === 0
        ? "name some: [() => import('@moe/kernels-cpu')]"
        : 'install one of them or mend the first reason',
  })
}

/** A setting ends when its function returns: what a promise does later would run without it. */
function synchronous<T>(op: string, result: T): T {
  if (!(result instanceof Promise)) return result
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: 'the function returned a promise, and the setting would end before it settles',
    fix: 'pass a synchronous function and await its result outside',
  })
}

/** Runs a synchronous `fn` without recording for gradients. */
export function noGrad<T>(fn: () => T): T {
  const before = context.recording
  context.recording = false
  try {
    return synchronous('noGrad', fn())
  } finally {
    context.recording = before
  }
}

/** Whether ops are being recorded for `backward`. */
export const isRecording = (): boolean => context.recording

/** Whether the code that runs repeats a forward pass for `checkpoint`, so that counters must not count again. */
export const isRecomputing = (): boolean => context.recomputing

/**
 * A value that a forward pass takes from state outside of tensors, such as random numbers from a stream that moves on: when `checkpoint`
 * repeats the pass, it is that of the first time.
 */
export function remember<T>(make: () => T): T {
  const recalled = context.recalled?.next()
  const value = recalled === undefined || recalled.done ? make() : (recalled.value as T)
  context.remembered?.push(value)
  return value
}

/** What `withPrecision` takes. */
export const precisions: readonly Precision[] = ['f32', 'bf16', 'fp8']

/**
 * For who keeps a precision till it is needed.
 * @throws MoeError E_ATTR when there is no such precision
 * @internal
 */
export function checkPrecision(op: string, precision: Precision): void {
  if (precisions.includes(precision)) return
  throw new MoeError({
    code: 'E_ATTR',
    op,
    problem: `no precision is called ${JSON.stringify(precision)}`,
    fix: "pass 'f32', 'bf16' or 'fp8'",
  })
}

/**
 * Runs a synchronous `fn` with matrix products multiplied in the given precision (accumulation stays f32). Parameters, optimizer state and
 * everything else stay f32. A backend without bf16 arithmetic multiplies in f32. In 'fp8' that is linear layers, experts, and what goes back through them; attention, batched products
 * and the loss of the head are in bf16 then (DeepSeek-V3 report 3.3).
 * @throws MoeError E_ATTR when there is no such precision.
 */
export function withPrecision<T>(precision: Precision, fn: () => T): T {
  checkPrecision('withPrecision', precision)
  const before = context.precision
  context.precision = precision
  try {
    return synchronous('withPrecision', fn())
  } finally {
    context.precision = before
  }
}

/** The precision that matrix products are given now. */
export const currentPrecision = (): Precision => context.precision

/** The same for products that are never in fp8. */
export const widePrecision = (precision: Precision = context.precision): WidePrecision =>
  precision === 'fp8' ? 'bf16' : precision

/** A fused op that a backend had no kernel for. */
export interface Fallback {
  /** `Backend.name`. */
  readonly backend: string
  /** The op that was decomposed. */
  readonly op: FusedName
  /** Calls since the process began. */
  readonly count: number
}

/** Fused ops that ran as their decomposition so far, most frequent first: slower, never wrong. */
export function fallbacks(): Fallback[] {
  return [...context.fallbacks]
    .map(([key, count]) => {
      const split = key.lastIndexOf(':')
      return { backend: key.slice(0, split), op: key.slice(split + 1) as FusedName, count }
    })
    .sort((a, b) => b.count - a.count)
}
