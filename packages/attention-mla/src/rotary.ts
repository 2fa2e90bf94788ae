/**
 * @file Rotary position embedding with YaRN, and the corresponding softmax scale (V3 report 4.3; modeling_deepseek.py
 * of the released weights).
 */
import { arange, type Backend, checkShared, fromHost, keep, MoeError, type Tensor } from '@moe/core'
import { type MlaConfig, mlaNames, type RopeScaling, ropeProblems } from './config.ts'

/** Returns YaRN's attention temperature: 0.1 m ln(factor) + 1, or 1 without an extension. */
export function yarnMscale(factor: number, mscale: number): number {
  return factor <= 1 ? 1 : 0.1 * mscale * Math.log(factor) + 1
}

/** Index of the pair that makes `rotations` rotations over the original context. */
function correctionDim(rotations: number, dim: number, base: number, context: number): number {
  return (dim * Math.log(context / (rotations * 2 * Math.PI))) / (2 * Math.log(base))
}

/**
 * Returns the frequency of each of the dim / 2 pairs, in radians per position. With YaRN, pairs that rotate often over
 * the original context keep their frequency, slow ones are divided by the factor, and those in between are blended
 * linearly.
 */
export function rotaryFrequencies(dim: number, base: number, scaling?: RopeScaling | null): Float64Array {
  const plain = Float64Array.from({ length: dim / 2 }, (_, i) => base ** ((-2 * i) / dim))
  if (!scaling) return plain
  const { factor, original_max_position_embeddings: context, beta_fast = 32, beta_slow = 1 } = scaling
  const low = Math.max(0, Math.floor(correctionDim(beta_fast, dim, base, context)))
  const high = Math.min(dim - 1, Math.ceil(correctionDim(beta_slow, dim, base, context)))
  return plain.map((frequency, i) => {
    const ramp = Math.min(1, Math.max(0, (i - low) / (high === low ? 0.001 : high - low)))
    return (frequency / factor) * ramp + frequency * (1 - ramp)
  })
}

/** Returns the factor of the attention scores: (nope + rope)^-0.5, times mscale^2 if YaRN's mscale_all_dim is set. */
export function softmaxScale(config: MlaConfig): number {
  const scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
  const { rope_scaling: scaling } = config
  if (!scaling?.mscale_all_dim) return scale
  return scale * yarnMscale(scaling.factor, scaling.mscale_all_dim) ** 2
}

/**
 * Returns the factor on cos and sin: mscale(factor, mscale) / mscale(factor, mscale_all_dim), which is 1 if both are
 * equal.
 */
export function rotaryAmplitude(scaling?: RopeScaling | null): number {
  if (!scaling) return 1
  const { factor, mscale, mscale_all_dim } = scaling
  if (mscale && mscale_all_dim) return yarnMscale(factor, mscale) / yarnMscale(factor, mscale_all_dim)
  return yarnMscale(factor, 1)
}

/** What attention needs of the positions of tokens: cos and sin of every pair, `[T, R/2]` or `[B, T, R/2]`. */
export interface RotaryTables {
  /** cos(position * frequency) times `rotaryAmplitude`. */
  readonly cos: Tensor
  /** sin(position * frequency) times `rotaryAmplitude`. */
  readonly sin: Tensor
  /** Factors of queries, `[T, 1]` or `[B, T, 1]`: see `llama_4_scaling_beta`. Undefined if queries are not scaled. */
  readonly queryFactors?: Tensor | undefined
}

/** The elements of `RotaryTables` on the host. */
export interface RotaryAngles {
  /** Elements of `cos`. */
  readonly cos: Float32Array<ArrayBuffer>
  /** Elements of `sin`. */
  readonly sin: Float32Array<ArrayBuffer>
  /** Elements of `queryFactors`. */
  readonly queryFactors?: Float32Array<ArrayBuffer> | undefined
}

/** Frees the tables. */
export function disposeTables({ cos, sin, queryFactors }: RotaryTables): void {
  for (const table of [cos, sin, queryFactors]) table?.dispose()
}

/** Creates rotation tables. One instance can serve all layers of a model. */
export class RotaryEmbedding {
  /** Number of rotated features, R. */
  readonly features: number
  readonly #frequencies: Float64Array
  readonly #scaling: RopeScaling | null
  /**
   * Tables of positions 0 .. n-1 by backend and n. n is a power of two, so that texts of all lengths take at most twice
   * the memory of the longest.
   */
  readonly #cached = new Map<Backend, Map<number, RotaryTables>>()

  /** @throws MoeError E_CONFIG that lists all problems */
  constructor(config: Pick<MlaConfig, 'qk_rope_head_dim' | 'rope_theta' | 'rope_scaling'>) {
    checkShared<Partial<MlaConfig>>('RotaryEmbedding', config, mlaNames)
    const { qk_rope_head_dim: features } = config
    const problems = ropeProblems(config)
    if (!(Number.isInteger(features / 2) && features > 0))
      problems.unshift(`qk_rope_head_dim = ${features} is not a positive even number`)
    if (problems.length > 0)
      throw new MoeError({ code: 'E_CONFIG', op: 'RotaryEmbedding', problem: problems.join('; ') })
    this.features = features
    this.#frequencies = rotaryFrequencies(features, config.rope_theta ?? 10000, config.rope_scaling)
    this.#scaling = config.rope_scaling ?? null
  }

  /** Returns tables for the first T positions. They belong to this object or to the current scope. */
  first(time: number, backend: Backend): RotaryTables {
    const rows = 2 ** Math.ceil(Math.log2(Math.max(1, time)))
    let byRows = this.#cached.get(backend)
    if (byRows === undefined) {
      byRows = new Map()
      this.#cached.set(backend, byRows)
    }
    let tables = byRows.get(rows)
    if (tables === undefined) {
      const positions = Int32Array.from({ length: rows }, (_, i) => i)
      tables = keep(this.#make(positions, [rows], backend))
      byRows.set(rows, tables)
    }
    if (rows === time) return tables
    const { cos, sin, queryFactors } = tables
    const head = (table: Tensor) => table.narrow(0, 0, time)
    return { cos: head(cos), sin: head(sin), queryFactors: queryFactors && head(queryFactors) }
  }

  /**
   * Returns tables with a batch axis for the given positions (row-major `[B, T]`). They belong to the current scope.
   * @throws MoeError E_SHAPE if the number of positions is not B T
   */
  at(positions: Int32Array, [batch, time]: readonly number[], backend: Backend): RotaryTables {
    if (positions.length !== batch * time) {
      throw new MoeError({
        code: 'E_SHAPE',
        op: 'RotaryEmbedding.at',
        problem: `got ${positions.length} positions for ${batch} x ${time} tokens`,
        fix: 'pass one position per token, row-major [batch, time]',
      })
    }
    return this.#make(positions, [batch, time], backend)
  }

  #make(positions: Int32Array, lead: readonly number[], backend: Backend): RotaryTables {
    const { cos, sin, queryFactors } = this.angles(positions)
    const table = (data: Float32Array, width: number) => fromHost(data, [...lead, width], 'f32', backend)
    const half = this.#frequencies.length
    return { cos: table(cos, half), sin: table(sin, half), queryFactors: queryFactors && table(queryFactors, 1) }
  }

  /**
   * Returns tables whose query factors count positions from the start of each token's text, `starts i32 [B, T]`.
   * Rotations need no such change: scores depend only on differences of positions.
   */
  from(starts: Tensor, tables: RotaryTables): RotaryTables {
    const { llama_4_scaling_beta: beta, original_max_position_embeddings: context } = this.#scaling ?? {}
    if (!beta || context === undefined) return tables
    const [batch, time] = starts.shape
    const positions = arange(time, { backend: starts.backend }).reshape([1, time]).sub(starts).cast('f32')
    // Half a position more does not change the result, but protects it from inexact divisions.
    const contexts = positions.add(0.5).div(context).floor()
    return { ...tables, queryFactors: contexts.add(1).log().mul(beta).add(1).reshape([batch, time, 1]) }
  }

  /** Returns the elements of the tables on the host, for every position. */
  angles(positions: Int32Array): RotaryAngles {
    const amplitude = rotaryAmplitude(this.#scaling)
    const half = this.#frequencies.length
    const cos = new Float32Array(positions.length * half)
    const sin = new Float32Array(positions.length * half)
    positions.forEach((position, p) => {
      for (let i = 0; i < half; i++) {
        const angle = position * this.#frequencies[i]
        cos[p * half + i] = amplitude * Math.cos(angle)
        sin[p * half + i] = amplitude * Math.sin(angle)
      }
    })
    const { llama_4_scaling_beta: beta, original_max_position_embeddings: context } = this.#scaling ?? {}
    if (!beta || context === undefined) return { cos, sin }
    const factor = (position: number) => 1 + beta * Math.log(1 + Math.floor(position / context))
    return { cos, sin, queryFactors: Float32Array.from(positions, factor) }
  }

  /** Frees the cached tables. */
  dispose(): void {
    for (const byRows of this.#cached.values()) {
      for (const tables of byRows.values()) disposeTables(tables)
    }
    this.#cached.clear()
  }
}

/**
 * Returns the shared tables if given, or new ones.
 * @throws MoeError E_CONFIG if the shared tables have another number of features
 */
export function sharedRotary(
  shared: RotaryEmbedding | undefined,
  config: Pick<MlaConfig, 'qk_rope_head_dim' | 'rope_theta' | 'rope_scaling'>,
): RotaryEmbedding {
  if (shared === undefined) return new RotaryEmbedding(config)
  if (shared.features === config.qk_rope_head_dim) return shared
  throw new MoeError({
    code: 'E_CONFIG',
    op: 'RotaryEmbedding',
    problem: `the shared tables rotate ${shared.features} features, the layer needs ${config.qk_rope_head_dim}`,
  })
}
