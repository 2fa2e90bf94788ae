/** @file Rotary angles with YaRN, and the softmax scale that belongs to them (V3 report 4.3; modeling_deepseek.py of the released weights). */
import { type Backend, fromHost, keep, type Tensor } from '@moe/core'
import type { MlaConfig, RopeScaling } from './config.ts'

/** YaRN's attention temperature: 0.1 m ln(factor) + 1, and 1 without extension. */
export function yarnMscale(factor: number, mscale: number): number {
  return factor <= 1 ? 1 : 0.1 * mscale * Math.log(factor) + 1
}

/** Pair index whose wavelength makes `rotations` turns over the original context. */
function correctionDim(rotations: number, dim: number, base: number, context: number): number {
  return (dim * Math.log(context / (rotations * 2 * Math.PI))) / (2 * Math.log(base))
}

/**
 * Rotation speed of each of the dim / 2 pairs, in radians per position. With YaRN, pairs that turn often over the original
 * context keep their speed, slow ones are divided by the factor, and those between are blended linearly.
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

/** (nope + rope)^-0.5, times mscale^2 when YaRN's mscale_all_dim is set. */
export function softmaxScale(config: MlaConfig): number {
  const scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
  const { rope_scaling: scaling } = config
  if (!scaling?.mscale_all_dim) return scale
  return scale * yarnMscale(scaling.factor, scaling.mscale_all_dim) ** 2
}

/** Factor on cos and sin: mscale(factor, mscale) / mscale(factor, mscale_all_dim), 1 where the two agree. */
export function rotaryAmplitude(scaling?: RopeScaling | null): number {
  if (!scaling) return 1
  const { factor, mscale, mscale_all_dim } = scaling
  if (mscale && mscale_all_dim) return yarnMscale(factor, mscale) / yarnMscale(factor, mscale_all_dim)
  return yarnMscale(factor, 1)
}

/** cos and sin of every pair, `[T, R/2]` or `[B, T, R/2]`. */
export interface RotaryTables {
  readonly cos: Tensor
  readonly sin: Tensor
}

/** Makes rotation tables; one serves all layers of a model. */
export class RotaryEmbedding {
  readonly #frequencies: Float64Array
  readonly #amplitude: number
  /** Tables of positions 0 .. T-1, by backend and T: training asks for the same ones at every step. */
  readonly #cached = new Map<Backend, Map<number, RotaryTables>>()

  constructor(config: Pick<MlaConfig, 'qk_rope_head_dim' | 'rope_theta' | 'rope_scaling'>) {
    this.#frequencies = rotaryFrequencies(config.qk_rope_head_dim, config.rope_theta ?? 10000, config.rope_scaling)
    this.#amplitude = rotaryAmplitude(config.rope_scaling)
  }

  /** Tables `[T, R/2]` of the first T positions; they belong to this object. */
  first(time: number, backend: Backend): RotaryTables {
    let byTime = this.#cached.get(backend)
    if (byTime === undefined) {
      byTime = new Map()
      this.#cached.set(backend, byTime)
    }
    let tables = byTime.get(time)
    if (tables === undefined) {
      tables = keep(
        this.#make(
          Int32Array.from({ length: time }, (_, i) => i),
          [time],
          backend,
        ),
      )
      byTime.set(time, tables)
    }
    return tables
  }

  /** Tables `[B, T, R/2]` of given positions (row-major `[B, T]`); they belong to the current scope. */
  at(positions: Int32Array, batch: number, backend: Backend): RotaryTables {
    return this.#make(positions, [batch, positions.length / batch], backend)
  }

  #make(positions: Int32Array, lead: readonly number[], backend: Backend): RotaryTables {
    const { cos, sin } = this.angles(positions)
    const shape = [...lead, this.#frequencies.length]
    return { cos: fromHost(cos, shape, 'f32', backend), sin: fromHost(sin, shape, 'f32', backend) }
  }

  /** The tables' elements on the host: cos and sin of every position and pair. */
  angles(positions: Int32Array): { readonly cos: Float32Array<ArrayBuffer>; readonly sin: Float32Array<ArrayBuffer> } {
    const half = this.#frequencies.length
    const cos = new Float32Array(positions.length * half)
    const sin = new Float32Array(positions.length * half)
    positions.forEach((position, p) => {
      for (let i = 0; i < half; i++) {
        const angle = position * this.#frequencies[i]
        cos[p * half + i] = this.#amplitude * Math.cos(angle)
        sin[p * half + i] = this.#amplitude * Math.sin(angle)
      }
    })
    return { cos, sin }
  }

  /** Frees the cached tables. */
  dispose(): void {
    for (const byTime of this.#cached.values()) {
      for (const { cos, sin } of byTime.values()) {
        cos.dispose()
        sin.dispose()
      }
    }
    this.#cached.clear()
  }
}
