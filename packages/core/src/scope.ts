/** @file Lifetimes: what is created inside a scope and not returned from it is freed when the scope ends. */
import { MoeError, needFunction } from './errors.ts'

/** An object with device memory that a scope can own. */
export abstract class Scoped {
  /** The scope that will free this, or null if it lives until `dispose()`. @internal */
  owner: Scope | null

  constructor() {
    this.owner = current
    if (current !== null) current.items.push(this)
    if (created !== null) created.push(this)
  }

  abstract dispose(): void

  /** Calls `dispose()`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose()
  }
}

export interface Scope {
  readonly items: Scoped[]
}

let current: Scope | null = null
/** Everything that the running `disposeOnError` has created so far. */
let created: Scoped[] | null = null

/**
 * Runs a synchronous function and frees every tensor created inside that is not part of its result: a tensor, or
 * arrays, maps and plain objects of tensors. The result belongs to the enclosing scope. If the function throws,
 * everything is freed.
 *
 * A scope also frees what is recorded for gradients, so call `backward` inside it.
 * @throws MoeError E_ATTR if the function returns a promise
 */
export function scope<T>(fn: () => T): T {
  needFunction('scope', fn)
  const outer = current
  const own = enterScope()
  let result: T
  try {
    result = fn()
    if (result instanceof Promise) {
      throw new MoeError({
        code: 'E_ATTR',
        op: 'scope',
        problem: 'the function returned a promise, but its tensors would be freed before it settles',
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
 * A scope that you can enter several times and free manually. For tensors that outlive one call, for example a
 * micro-batch in a pipeline between its forward and its backward pass.
 */
export class Lifetime {
  readonly #scope: Scope = { items: [] }

  /** Runs a synchronous function. The tensors it creates, including its result, live until `dispose()`. */
  run<T>(fn: () => T): T {
    needFunction('Lifetime.run', fn)
    const outer = current
    current = this.#scope
    try {
      return fn()
    } finally {
      current = outer
    }
  }

  /** Frees everything created inside and not passed to `keep`. The lifetime can be entered again. */
  dispose(): void {
    const items = this.#scope.items.splice(0)
    for (const item of items) if (item.owner === this.#scope) item.dispose()
  }

  /** Calls `dispose()`, for `using`. */
  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** Opens a scope manually, for the inner loop of `backward`. Always close it with `leaveScope`. Internal. */
export function enterScope(): Scope {
  current = { items: [] }
  return current
}

/** Returns the innermost open scope. Internal. */
export const currentScope = (): Scope | null => current

/** Moves a kept tensor to the innermost open scope. Internal. */
export function adopt<T extends Scoped>(item: T): T {
  item.owner = current
  current?.items.push(item)
  return item
}

/** Frees what a scope still owns and makes `outer` the current one. Internal. */
export function leaveScope(own: Scope, outer: Scope | null): void {
  current = outer
  const { items } = own
  for (let i = 0; i < items.length; i++) if (items[i].owner === own) items[i].dispose()
}

/**
 * Runs a synchronous function that creates persistent tensors, for example a constructor. If it throws, for lack of
 * memory or any other reason, everything it created is freed, including parameters and kept tensors.
 */
export function disposeOnError<T>(fn: () => T): T {
  needFunction('disposeOnError', fn)
  const outer = created
  const own = outer ?? []
  const before = own.length
  created = own
  try {
    return fn()
  } catch (error) {
    for (const item of own.splice(before)) item.dispose()
    throw error
  } finally {
    created = outer
  }
}

/**
 * Removes tensors (also inside arrays, maps and plain objects) from their scopes, so that they live until you dispose
 * of them. Returns its argument.
 */
export function keep<T>(value: T): T {
  move(value, null, null, 0)
  return value
}

/** `Object.groupBy` and others return objects without a prototype. */
function isPlain(value: object): boolean {
  const prototype: unknown = Object.getPrototypeOf(value)
  return prototype === Object.prototype || prototype === null
}

/** Moves the tensors in `value` that `from` owns (any owner if null) to `to`. */
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
  } else if (isPlain(value)) {
    for (const key in value) move((value as Record<string, unknown>)[key], from, to, depth + 1)
  }
}
