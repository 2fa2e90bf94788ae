/** @file The memory of a cache: rows of features, arranged in blocks of equal size, for each layer. */
import {
  type Backend,
  concat,
  type ErrorCode,
  keep,
  MoeError,
  type OptionNames,
  scope,
  setRows,
  shown,
  type Tensor,
  zeros,
} from '@moe/core'

/**
 * Dtype of a cache. bf16 takes half the memory of f32, as in published figures. Attention computes in the same
 * precision with either.
 */
export type CacheDType = 'f32' | 'bf16'

const cacheDTypes: readonly CacheDType[] = ['f32', 'bf16']

export const cacheError = (code: ErrorCode, method: string, problem: string, fix?: string): MoeError =>
  new MoeError({ code, op: `KvCache.${method}`, problem, fix })

/** Options of every kind of cache. */
export interface CacheMemoryOptions {
  /** Number of attention layers, each of which has its own rows. */
  readonly layers: number
  /** Default f32. bf16 requires a backend that supports it. */
  readonly dtype?: CacheDType
  /** Where the rows are stored. Default: the backend set by `setDefaultBackend`. */
  readonly backend?: Backend
}

export const memoryNames: OptionNames<CacheMemoryOptions> = { layers: true, dtype: true, backend: true }

/** Checks sizes and dtype of a cache. @throws MoeError E_CONFIG */
export function checkSizes(sizes: Readonly<Record<string, number>>, dtype: CacheDType): void {
  for (const [name, size] of Object.entries(sizes)) {
    if (!Number.isInteger(size) || size < 1) {
      throw cacheError('E_CONFIG', 'new', `${name} = ${shown(size)} is not a positive integer`)
    }
  }
  if (cacheDTypes.includes(dtype)) return
  const problem = `dtype = ${JSON.stringify(dtype)} is not supported`
  throw cacheError('E_CONFIG', 'new', problem, "pass 'f32' or 'bf16'")
}

export interface RowsShape {
  readonly blocks: number
  readonly perBlock: number
  /** Elements of a row. */
  readonly features: number
}

/** Rows `[blocks, perBlock, features]` of each layer, overwritten in place if the backend can. */
export class CacheRows {
  readonly features: number
  readonly dtype: CacheDType
  readonly layers: number
  readonly backend: Backend
  #rows: Tensor[]
  /** How often rows were moved to other memory. */
  moves = 0

  constructor({ blocks, perBlock, features }: RowsShape, { layers, dtype, backend }: Required<CacheMemoryOptions>) {
    this.features = features
    this.dtype = dtype
    this.layers = layers
    this.backend = backend
    this.#rows = keep(scope(() => Array.from({ length: layers }, () => this.#empty(blocks, perBlock))))
  }

  /** Returns the rows of a layer. @throws MoeError E_ATTR, E_DISPOSED */
  of(layer: number): Tensor {
    const rows = this.#rows[layer]
    if (rows !== undefined) return rows
    if (this.#rows.length === 0) throw cacheError('E_DISPOSED', 'rows', 'the cache was disposed')
    const problem = `layer ${layer} does not exist in a cache of ${this.#rows.length} layers`
    throw cacheError('E_ATTR', 'rows', problem, 'create the cache with more layers')
  }

  /** Writes `source [..., features]`, rounded to the dtype, over the rows of a layer at `index i32 [n]`. */
  write(layer: number, index: Tensor, source: Tensor): void {
    const old = this.of(layer)
    const { shape } = old
    scope(() => {
      const rounded = source.detach().cast(this.dtype).reshape([index.size, this.features])
      // The reshape shares memory with `old`. Once `old` is disposed, the rows are written in place.
      let flat = old.reshape([shape[0] * shape[1], this.features])
      old.dispose()
      try {
        flat = setRows(flat, index, rounded, { donate: true })
      } finally {
        // If there was not enough memory, the old rows stay.
        this.#rows[layer] = keep(flat.reshape(shape))
      }
    })
  }

  /** Grows to more blocks, or to more rows in each block. */
  grow(to: { readonly blocks: number; readonly perBlock: number }): void {
    // Layer by layer: if memory runs out, layers that have grown stay so, and a retry continues with the others.
    for (const [layer, old] of this.#rows.entries()) {
      const [blocks, perBlock] = old.shape
      if (blocks === to.blocks && perBlock === to.perBlock) continue
      const more =
        blocks === to.blocks
          ? () => concat([old, this.#empty(blocks, to.perBlock - perBlock)], 1)
          : () => concat([old, this.#empty(to.blocks - blocks, perBlock)], 0)
      this.#rows[layer] = keep(scope(more))
      old.dispose()
      this.moves++
    }
  }

  #empty(blocks: number, perBlock: number): Tensor {
    return scope(() => zeros([blocks, perBlock, this.features], { backend: this.backend }).cast(this.dtype))
  }

  dispose(): void {
    for (const rows of this.#rows) rows.dispose()
    this.#rows = []
  }
}
