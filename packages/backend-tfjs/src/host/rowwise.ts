/** @file Fused ops over the last axis: softmax, RMSNorm, SwiGLU. Exponentials are computed by TensorFlow.js kernels, the rest in one pass. */
import { type FusedAttrs, type Shape, sizeOf, type TensorSpec, type Value } from '@moe/core'
import type { TfTensor } from '../namespace.ts'
import { tensorOf } from '../runner.ts'
import { f32Of, type Host } from './memory.ts'

const f32View = (host: Host, tensor: TfTensor): Float32Array => host.view(tensor) as Float32Array
const lastAxis = (shape: Shape): number => shape[shape.length - 1]

export function softmax(host: Host, [x]: readonly Value[], _: FusedAttrs['softmax'], [spec]: readonly TensorSpec[]) {
  const size = lastAxis(x.shape)
  if (sizeOf(x.shape) === 0) return [host.output(spec.shape, 'float32')]
  const out = host.runner.run('Softmax', { logits: tensorOf(x) }, { dim: x.shape.length - 1 })
  const [to, from] = [f32View(host, out), f32Of(host, x)]
  // The kernel does not handle rows of only -Infinity: -Infinity - -Infinity is NaN.
  for (let row = 0; row < to.length; row += size) {
    if (to[row] === to[row] || from[row] !== Number.NEGATIVE_INFINITY) continue
    let masked = true
    for (let i = row; masked && i < row + size; i++) masked = from[i] === Number.NEGATIVE_INFINITY
    if (masked) to.fill(0, row, row + size)
  }
  return [out]
}

export function softmaxBackward(host: Host, [y, dy]: readonly Value[], _: unknown, [spec]: readonly TensorSpec[]) {
  const out = host.output(spec.shape, 'float32')
  const [dx, p, g] = [f32View(host, out), f32Of(host, y), f32Of(host, dy)]
  const size = lastAxis(y.shape)
  for (let row = 0; row < dx.length; row += size) {
    let sum = 0
    for (let i = row; i < row + size; i++) sum += p[i] * g[i]
    for (let i = row; i < row + size; i++) dx[i] = p[i] * (g[i] - sum)
  }
  return [out]
}

export function rmsNorm(
  host: Host,
  [x, weight]: readonly Value[],
  { eps }: FusedAttrs['rmsNorm'],
  specs: readonly TensorSpec[],
) {
  const out = host.output(specs[0].shape, 'float32')
  const rstd = host.output(specs[1].shape, 'float32')
  const [y, r] = [f32View(host, out), f32View(host, rstd)]
  const [from, w] = [f32Of(host, x), f32Of(host, weight)]
  const size = w.length
  for (let n = 0; n < r.length; n++) {
    const row = n * size
    let sum = 0
    for (let i = 0; i < size; i++) sum += from[row + i] * from[row + i]
    r[n] = 1 / Math.sqrt(sum / size + eps)
    const scale = r[n]
    for (let i = 0; i < size; i++) y[row + i] = from[row + i] * scale * w[i]
  }
  return [out, rstd]
}

export function rmsNormBackward(
  host: Host,
  [x, weight, rstd, dy]: readonly Value[],
  _: unknown,
  specs: readonly TensorSpec[],
) {
  const [dxOut, dwOut] = specs.map(({ shape }) => host.output(shape, 'float32'))
  const [dx, dw] = [f32View(host, dxOut), f32View(host, dwOut)]
  const [from, w, r, g] = [x, weight, rstd, dy].map(value => f32Of(host, value))
  const size = w.length
  const total = new Float64Array(size)
  for (let n = 0; n < r.length; n++) {
    const row = n * size
    const scale = r[n]
    let sum = 0
    for (let i = 0; i < size; i++) {
      const normal = from[row + i] * scale
      total[i] += g[row + i] * normal
      sum += g[row + i] * w[i] * normal
    }
    const mean = sum / size
    for (let i = 0; i < size; i++) dx[row + i] = (g[row + i] * w[i] - from[row + i] * scale * mean) * scale
  }
  dw.set(total)
  return [dxOut, dwOut]
}

export function swiglu(host: Host, [gate, up]: readonly Value[], _: unknown, [spec]: readonly TensorSpec[]) {
  if (sizeOf(spec.shape) === 0) return [host.output(spec.shape, 'float32')]
  const { runner } = host
  const s = runner.run('Sigmoid', { x: tensorOf(gate) })
  const silu = runner.run('Multiply', { a: tensorOf(gate), b: s })
  s.dispose()
  return [runner.run('Multiply', { a: silu, b: tensorOf(up) })]
}

export function swigluBackward(host: Host, [gate, up, dy]: readonly Value[], _: unknown, specs: readonly TensorSpec[]) {
  const [dGate, dUp] = specs.map(({ shape }) => host.output(shape, 'float32'))
  if (sizeOf(gate.shape) === 0) return [dGate, dUp]
  const sigmoid = host.runner.run('Sigmoid', { x: tensorOf(gate) })
  const s = f32View(host, sigmoid)
  const [dg, du] = [f32View(host, dGate), f32View(host, dUp)]
  const [a, b, g] = [gate, up, dy].map(value => f32Of(host, value))
  for (let i = 0; i < s.length; i++) {
    // d silu(a) / da = s (1 + a (1 - s))
    dg[i] = g[i] * b[i] * s[i] * (1 + a[i] * (1 - s[i]))
    du[i] = g[i] * a[i] * s[i]
  }
  return [dGate, dUp]
}
