/** @file For tests: attention and its gradient as plain loops in double precision. */

export interface AttentionSizes {
  readonly B: number
  readonly T: number
  readonly S: number
  readonly H: number
  readonly G: number
  readonly Dk: number
  readonly Dv: number
}

/** Returns the number of keys that query t attends to, from the first on. */
export function visibleKeys(sizes: AttentionSizes, causal: boolean, t: number, length = sizes.S): number {
  return causal ? Math.max(0, Math.min(length, length - sizes.T + t + 1)) : length
}

export function plainAttention(
  sizes: AttentionSizes,
  q: ArrayLike<number>,
  k: ArrayLike<number>,
  v: ArrayLike<number>,
  options: { readonly causal: boolean; readonly scale: number; readonly lengths?: readonly number[] },
  dout?: ArrayLike<number>,
) {
  const { B, T, S, H, G, Dk, Dv } = sizes
  const out = new Float64Array(B * T * H * Dv)
  const lse = new Float64Array(B * H * T)
  const dq = new Float64Array(B * T * H * Dk)
  const dk = new Float64Array(B * S * G * Dk)
  const dv = new Float64Array(B * S * G * Dv)
  for (let b = 0; b < B; b++) {
    for (let h = 0; h < H; h++) {
      const g = Math.floor(h / (H / G))
      for (let t = 0; t < T; t++) {
        const n = visibleKeys(sizes, options.causal, t, options.lengths?.[b])
        const qAt = ((b * T + t) * H + h) * Dk
        const outAt = ((b * T + t) * H + h) * Dv
        const kAt = (s: number) => ((b * S + s) * G + g) * Dk
        const vAt = (s: number) => ((b * S + s) * G + g) * Dv
        const p: number[] = []
        for (let s = 0; s < n; s++) {
          let dot = 0
          for (let d = 0; d < Dk; d++) dot += q[qAt + d] * k[kAt(s) + d]
          p.push(dot * options.scale)
        }
        const max = Math.max(...p)
        const sum = p.reduce((total, x) => total + Math.exp(x - max), 0)
        lse[(b * H + h) * T + t] = n === 0 ? Number.NEGATIVE_INFINITY : max + Math.log(sum)
        for (let s = 0; s < n; s++) {
          p[s] = Math.exp(p[s] - max) / sum
          for (let d = 0; d < Dv; d++) out[outAt + d] += p[s] * v[vAt(s) + d]
        }
        if (!dout) continue
        let delta = 0
        for (let d = 0; d < Dv; d++) delta += dout[outAt + d] * out[outAt + d]
        for (let s = 0; s < n; s++) {
          let dp = 0
          for (let d = 0; d < Dv; d++) {
            dp += dout[outAt + d] * v[vAt(s) + d]
            dv[vAt(s) + d] += p[s] * dout[outAt + d]
          }
          const ds = p[s] * (dp - delta) * options.scale
          for (let d = 0; d < Dk; d++) {
            dq[qAt + d] += ds * k[kAt(s) + d]
            dk[kAt(s) + d] += ds * q[qAt + d]
          }
        }
      }
    }
  }
  return { out, lse, dq, dk, dv }
}
