/** @file Lifetimes: whatever is made inside a scope and not returned from it is freed at its end. */
import { MoeError } from './errors.ts'

/** Something with device memory that a scope can own. */
export abstract class Scoped {
  /** The scope that will free this, or null when it lives until `dispose()`. @internal */
  owner: Scope | null

  constructor() {
    this.owner = current
    if (current !== null) current.items.push(this)
    if (made !== null) made.push(this)
  }

  abstract dispose(): void

  /** `dispose()`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose()
  }
}

export interface Scope {
  readonly items: Scoped[]
}

let current: Scope | null = null
/** What the running `allOrNothing` has made so far. */
let made: Scoped[] | null = null

/**
 * Runs a synchronous function and frees every tensor made inside that is not part of its result (a tensor, or arrays and plain
 * objects of them). What is returned belongs to the enclosing scope. On an exception everything is freed.
 *
 * A scope also frees what is recorded for gradients, so call `backward` inside it.
 */
export function scope<T>(fn: () => T): T {
  const outer = current
  const own = enterScope()
  let result: T
  try {
    result = fn()
    if (result instanceof Promise) {
      throw new MoeError({
        code: 'E_ATTR',
        op: 'scope',
        problem: 'the function returned a promise, and its tensors would be freed before it settles',
        fix: 'pass a synchronous function and await its result outside',
      })
    }
    move(result, own, outer, 0)
  } finally {
    leaveScope(own, outer)
  }
  return result
}

/**
 * A scope that is entered as often as one likes and freed by hand, for what lives longer than one call: a micro-batch on its way through a pipeline, from
 * its forward to its backward pass.
 */
export class Lifetime {
  readonly #scope: Scope = { items: [] }

  /** Runs a synchronous function; the tensors that it makes live until `dispose()`, its result included. */
  run<T>(fn: () => T): T {
    const outer = current
    current = this.#scope
    try {
      return fn()
    } finally {
      current = outer
    }
  }

  /** Frees what was made in it and not kept. It can be entered again. */
  dispose(): void {
    const items = this.#scope.items.splice(0)
    for (const item of items) if (item.owner === this.#scope) item.dispose()
  }

  /** `dispose()`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** Internal: opens a scope by hand, for the inner loop of `backward`. Close it with `leaveScope` whatever happens. */
export function enterScope(): Scope {
  current = { items: [] }
  return current
}

/** Internal: the scope that is open now. */
export const currentScope = (): Scope | null => current

/** Internal: gives a kept tensor to the scope that is open now. */
export function adopt<T extends Scoped>(item: T): T {
  item.owner = current
  current?.items.push(item)
  return item
}

/** Internal: frees what a scope still owns and makes `outer` the open one. */
export function leaveScope(own: Scope, outer: Scope | null): void {
  current = outer
  const { items } = own
  for (let i = 0; i < items.length; i++) if (items[i].owner === own) items[i].dispose()
}

/**
 * Runs a synchronous function that makes what persists, a constructor say. When it throws, for want of memory or whatever else, all that it made is
 * freed: parameters and kept tensors, too.
 */
export function allOrNothing<T>(fn: () => T): T {
  const outer = made
  const own = outer ?? []
  const before = own.length
  made = own
  try {
    return fn()
  } catch (error) {
    for (const item of own.splice(before)) item.dispose()
    throw error
  } finally {
    made = outer
  }
}

/** Takes tensors out of their scopes: they live until they are disposed. Returns its argument. */
export function keep<T>(value: T): T {
  move(value, null, null, 0)
  return value
}

/** Gives what `value` holds and `from` owns (any owner when null) to `to`. */
function move(value: unknown, from: Scope | null, to: Scope | null, depth: number): void {
  if (value === null || typeof value !== 'object' || depth > 8) return
  if (value instanceof Scoped) {
    if (from === null || value.owner === from) {
      value.owner = to
      if (to !== null) to.items.push(value)
    }
    return
  }
  if (Array.isArray(value)) {
    for (let i = 0; i < value.length; i++) move(value[i], from, to, depth + 1)
  } else if (value instanceof Map) {
    for (const item of value.values()) move(item, from, to, depth + 1)
  } else if (Object.getPrototypeOf(value) === Object.prototype) {
    for (const key in value) move((value as Record<string, unknown>)[key], from, to, depth + 1)
  }
}
