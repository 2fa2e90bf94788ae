/** @file The memory of a cache: rows of features, arranged in blocks of equal size, for each layer. */
import {
  type Backend,
  concat,
  dtypeBytes,
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

/** Elements of the rows that a layer stores for each token. */
export interface CacheFeatures {
  /** What attention reads: the latent and the rope key, or keys and values. */
  readonly attention: number
  /** The key of a lightning indexer; 0 for attention without one. */
  readonly index: number
}

/** Which of the rows of a layer. */
export type RowKind = keyof CacheFeatures

const rowKinds: readonly RowKind[] = ['attention', 'index']

/** Accepts a number for caches without index keys. */
export const cacheFeaturesOf = (features: number | CacheFeatures): CacheFeatures =>
  typeof features === 'number' ? { attention: features, index: 0 } : features

/** Options of every kind of cache. */
export interface CacheMemoryOptions {
  /** Number of attention layers, each of which has its own rows. */
  readonly layers: number
  /** The layers that store keys of an indexer. Default: all, if the features include them. */
  readonly indexLayers?: readonly number[] | undefined
  /** Default f32. bf16 requires a backend that supports it. */
  readonly dtype?: CacheDType | undefined
  /** Where the rows are stored. Default: the backend set by `setDefaultBackend`. */
  readonly backend?: Backend | undefined
}

export const memoryNames: OptionNames<CacheMemoryOptions> = {
  layers: true,
  indexLayers: true,
  dtype: true,
  backend: true,
}

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

/** Options without defaults. */
type RowsMemory = Required<Pick<CacheMemoryOptions, 'dtype' | 'backend'>>

interface BlockSizes {
  readonly blocks: number
  readonly perBlock: number
}

export interface RowsShape extends BlockSizes {
  readonly features: CacheFeatures
}

/** Rows `[blocks, perBlock, features]` of each kind and layer, overwritten in place if the backend can. */
export class CacheRows {
  readonly features: CacheFeatures
  readonly dtype: CacheDType
  readonly backend: Backend
  /** Bytes of all rows of a token. */
  readonly bytesPerToken: number
  /** By layer. */
  readonly #rows: Readonly<Record<RowKind, Map<number, Tensor>>>
  /** How often rows were moved to other memory. */
  moves = 0

  constructor({ blocks, perBlock, features }: RowsShape, options: CacheMemoryOptions & RowsMemory) {
    const { layers, dtype, backend } = options
    const all = Array.from({ length: layers }, (_, layer) => layer)
    const { indexLayers = all } = options
    this.features = features
    this.dtype = dtype
    this.backend = backend
    const inLayers = (kind: RowKind, which: readonly number[]) =>
      new Map(which.map(layer => [layer, this.#empty(kind, blocks, perBlock)]))
    this.#rows = keep(
      scope(() => ({
        attention: inLayers('attention', all),
        index: inLayers('index', features.index ? indexLayers : []),
      })),
    )
    this.bytesPerToken = dtypeBytes[dtype] * (layers * features.attention + this.#rows.index.size * features.index)
  }

  /** Returns the rows of a layer. @throws MoeError E_ATTR, E_DISPOSED */
  of(layer: number, kind: RowKind = 'attention'): Tensor {
    const rows = this.#rows[kind].get(layer)
    if (rows !== undefined) return rows
    const { size: layers } = this.#rows.attention
    if (layers === 0) throw cacheError('E_DISPOSED', 'rows', 'the cache was disposed')
    if (this.#rows.attention.has(layer)) {
      const problem = `the cache stores no keys of an indexer${this.features.index === 0 ? '' : ` for layer ${layer}`}`
      throw cacheError('E_ATTR', 'rows', problem, 'create it with the cacheFeatures of the attention')
    }
    const problem = `layer ${layer} does not exist in a cache of ${layers} layers`
    throw cacheError('E_ATTR', 'rows', problem, 'create the cache with more layers')
  }

  /** Writes `source [..., features]`, rounded to the dtype, over the rows of a layer at `index i32 [n]`. */
  write(layer: number, kind: RowKind, index: Tensor, source: Tensor): void {
    const old = this.of(layer, kind)
    const { shape } = old
    scope(() => {
      const rounded = source.detach().cast(this.dtype).reshape([index.size, shape[2]])
      // The reshape shares memory with `old`. Once `old` is disposed, the rows are written in place.
      let flat = old.reshape([shape[0] * shape[1], shape[2]])
      old.dispose()
      try {
        flat = setRows(flat, index, rounded, { donate: true })
      } finally {
        // If there was not enough memory, the old rows stay.
        this.#rows[kind].set(layer, keep(flat.reshape(shape)))
      }
    })
  }

  /** Grows to more blocks, or to more rows in each block. If memory runs out, the rows stay as they are. */
  grow(to: BlockSizes): void {
    const [blocks, perBlock] = this.of(0).shape
    try {
      this.#resize(to)
    } catch (error) {
      try {
        // Layers that have grown already would occupy memory that the next pass needs.
        this.#resize({ blocks, perBlock })
      } catch {
        // No memory for the copy of a layer: it stays larger, which has no other effect.
      }
      throw error
    }
  }

  #resize(to: BlockSizes): void {
    for (const kind of rowKinds) {
      for (const [layer, old] of this.#rows[kind]) {
        const [blocks, perBlock] = old.shape
        const byBlocks = blocks !== to.blocks
        const more = byBlocks ? to.blocks - blocks : to.perBlock - perBlock
        if (more === 0) continue
        const resized = () => {
          if (more < 0) return byBlocks ? old.narrow(0, 0, to.blocks) : old.narrow(1, 0, to.perBlock)
          const empty = byBlocks ? this.#empty(kind, more, perBlock) : this.#empty(kind, blocks, more)
          return concat([old, empty], byBlocks ? 0 : 1)
        }
        this.#rows[kind].set(layer, keep(scope(resized)))
        old.dispose()
        this.moves++
      }
    }
  }

  #empty(kind: RowKind, blocks: number, perBlock: number): Tensor {
    const shape = [blocks, perBlock, this.features[kind]]
    return scope(() => zeros(shape, { backend: this.backend }).cast(this.dtype))
  }

  dispose(): void {
    for (const kind of rowKinds) {
      for (const rows of this.#rows[kind].values()) rows.dispose()
      this.#rows[kind].clear()
    }
  }
}
