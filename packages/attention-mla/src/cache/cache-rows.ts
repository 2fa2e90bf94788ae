/** @file The memory of a cache: rows of features, per layer in as many blocks of as many rows. */
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

/** What a cache holds. bf16 takes half the memory, as published figures do; attention over it is computed as ever. */
export type CacheDType = 'f32' | 'bf16'

const cacheDTypes: readonly CacheDType[] = ['f32', 'bf16']

export const refused = (code: ErrorCode, method: string, problem: string, fix?: string): MoeError =>
  new MoeError({ code, op: `KvCache.${method}`, problem, fix })

/** What every kind of cache is told. */
export interface CacheMemoryOptions {
  /** Layers of the model that attend: each has rows of its own. */
  readonly layers: number
  /** Default f32. bf16 needs a backend that has it. */
  readonly dtype?: CacheDType
  /** Where the rows are. Default: that of `setDefaultBackend`. */
  readonly backend?: Backend
}

export const memoryNames: OptionNames<CacheMemoryOptions> = { layers: true, dtype: true, backend: true }

/** @throws MoeError E_CONFIG */
export function checkSizes(sizes: Readonly<Record<string, number>>, dtype: CacheDType): void {
  for (const [name, size] of Object.entries(sizes)) {
    if (!Number.isInteger(size) || size < 1) {
      throw refused('E_CONFIG', 'new', `${name} = ${shown(size)} is not a positive integer`)
    }
  }
  if (cacheDTypes.includes(dtype)) return
  const problem = `dtype = ${JSON.stringify(dtype)} is none that a cache has`
  throw refused('E_CONFIG', 'new', problem, "pass 'f32' or 'bf16'")
}

export interface RowsShape {
  readonly blocks: number
  readonly perBlock: number
  /** Elements of a row. */
  readonly features: number
}

/** Rows `[blocks, perBlock, features]` of each layer, overwritten in place where the backend can. */
export class CacheRows {
  readonly features: number
  readonly dtype: CacheDType
  readonly layers: number
  readonly backend: Backend
  #rows: Tensor[]
  /** How often it has moved to other memory. */
  moves = 0

  constructor({ blocks, perBlock, features }: RowsShape, { layers, dtype, backend }: Required<CacheMemoryOptions>) {
    this.features = features
    this.dtype = dtype
    this.layers = layers
    this.backend = backend
    this.#rows = keep(scope(() => Array.from({ length: layers }, () => this.#empty(blocks, perBlock))))
  }

  /** @throws MoeError E_ATTR, E_DISPOSED */
  of(layer: number): Tensor {
    const rows = this.#rows[layer]
    if (rows !== undefined) return rows
    if (this.#rows.length === 0) throw refused('E_DISPOSED', 'rows', 'the cache was disposed')
    const problem = `there is no layer ${layer} of ${this.#rows.length}`
    throw refused('E_ATTR', 'rows', problem, 'make the cache with more layers')
  }

  /** Writes `source [..., features]`, rounded, over the rows of a layer whose numbers are `index i32 [n]`. */
  write(layer: number, index: Tensor, source: Tensor): void {
    const old = this.of(layer)
    const { shape } = old
    scope(() => {
      const rounded = source.detach().cast(this.dtype).reshape([index.size, this.features])
      // The reshape shares memory with `old`; once that is given up the rows are written in place.
      let flat = old.reshape([shape[0] * shape[1], this.features])
      old.dispose()
      try {
        flat = setRows(flat, index, rounded, { donate: true })
      } finally {
        // Where there was no memory for it, what was there stays.
        this.#rows[layer] = keep(flat.reshape(shape))
      }
    })
  }

  /** More blocks, or more rows in each. */
  grow(to: { readonly blocks: number; readonly perBlock: number }): void {
    // One by one: where memory ends, those that have grown stay, and another try goes on with the others.
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
