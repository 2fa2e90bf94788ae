/**
 * @file The two halves of kv_b_proj as matrices of each head, for decoding in latent space.
 *
 * Legend: H heads, N nope features, V value features, C kv_lora_rank, M rows of a head.
 */
import {
  denseWeight,
  fromHost,
  keep,
  type Parameter,
  QuantizedParameter,
  type QuantizedWeight,
  quantizedGroupedMatmul,
  quantizeWeight,
  scope,
  type Tensor,
  weightVersion,
} from '@moe/core'
import type { MlaConfig } from './config.ts'

/**
 * W_UK and W_UV, valid for one version of the weight: `[H, N, C]` and `[H, V, C]`. If the weight is quantized, `[H, C,
 * N]` and `[H, V, C]` in bf16, because quantizing W_UK again along another axis would add a second error.
 */
type Absorbed = { readonly of: Tensor; readonly version: number } & (
  | { readonly keyUp_HNC: Tensor; readonly valueUp_HVC: Tensor }
  | { readonly keyUp_HCN: QuantizedWeight; readonly valueUp_HVC: QuantizedWeight }
)

/** The products of absorbed decoding. Copies of the weight are created when needed, and kept until it changes. */
export class AbsorbedProjections {
  readonly #config: MlaConfig
  #absorbed: Absorbed | null = null

  constructor(config: MlaConfig) {
    this.#config = config
  }

  /**
   * Returns the products with W_UK and W_UV of every head: `[H, M, N]` to `[H, M, C]`, and `[H, M, C]` to `[H, M, V]`.
   * @param weight that of kv_b_proj
   */
  products(
    weight: Parameter,
    rows: number,
  ): { readonly up: (x: Tensor) => Tensor; readonly down: (x: Tensor) => Tensor } {
    const absorbed = this.#absorb(weight)
    if ('keyUp_HNC' in absorbed) {
      const { keyUp_HNC, valueUp_HVC } = absorbed
      return {
        up: x => x.matmul(keyUp_HNC),
        down: x => x.matmul(valueUp_HVC, { transposeB: true }),
      }
    }
    const { num_attention_heads: heads } = this.#config
    const starts = Int32Array.from({ length: heads + 1 }, (_, head) => head * rows)
    const offsets = fromHost(starts, [heads + 1], 'i32', weight.backend)
    const product = (half: QuantizedWeight) => (x: Tensor) =>
      quantizedGroupedMatmul(x.reshape([heads * rows, x.shape[2]]), half, offsets).reshape([heads, rows, half.shape[1]])
    return { up: product(absorbed.keyUp_HCN), down: product(absorbed.valueUp_HVC) }
  }

  #absorb(weight: Parameter): Absorbed {
    const before = this.#absorbed
    if (before !== null && before.of === weight && before.version === weightVersion(weight)) return before
    const { num_attention_heads: heads, qk_nope_head_dim: nope, kv_lora_rank: rank, v_head_dim: value } = this.#config
    this.release()
    const isQuantized = weight instanceof QuantizedParameter && weight.backend.dtypes.has('bf16')
    const absorbed = {
      of: weight,
      version: weightVersion(weight),
      ...keep(
        scope(() => {
          const perHead = denseWeight(weight)
            .detach()
            .reshape([heads, nope + value, rank])
          const keyUp_HNC = perHead.narrow(1, 0, nope)
          const valueUp_HVC = perHead.narrow(1, nope, nope + value)
          if (!isQuantized) return { keyUp_HNC, valueUp_HVC }
          return {
            keyUp_HCN: quantizeWeight(keyUp_HNC.permute([0, 2, 1]), 'bf16'),
            valueUp_HVC: quantizeWeight(valueUp_HVC, 'bf16'),
          }
        }),
      ),
    }
    this.#absorbed = absorbed
    return absorbed
  }

  /** Frees the copies of the weight. */
  release(): void {
    const absorbed = this.#absorbed
    if (absorbed !== null) {
      const held =
        'keyUp_HNC' in absorbed
          ? [absorbed.keyUp_HNC, absorbed.valueUp_HVC]
          : [absorbed.keyUp_HCN.q, absorbed.valueUp_HVC.q]
      for (const tensor of held) tensor.dispose()
    }
    this.#absorbed = null
  }
}
