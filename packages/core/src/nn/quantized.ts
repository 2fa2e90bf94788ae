/** @file Parameters stored in fewer bits, and what layers do with a parameter of either kind and with what stands beside it. */
import type { Shape, WeightFormat } from '../backend.ts'
import { noGrad, widePrecision, withPrecision } from '../context.ts'
import { fromHost } from '../create.ts'
import { dtypeBytes } from '../dtype.ts'
import { MoeError } from '../errors.ts'
import { groupedMatmul } from '../fused/grouped-matmul.ts'
import {
  dequantizeWeight,
  type QuantizedWeight,
  quantizedGroupedMatmul,
  quantizedMatmul,
  quantizeWeight,
} from '../fused/quantized-matmul.ts'
import { shapeError } from '../infer.ts'
import { needTensor } from '../need-tensor.ts'
import { keep, scope } from '../scope.ts'
import { sameShape, showShape, sizeOf } from '../shape.ts'
import { concat, spend, type Tensor } from '../tensor.ts'
import { atOnce, inTurns, pacer } from '../turns.ts'
import { Module, namedParameters } from './module.ts'
import { type Adapter, Parameter } from './parameter.ts'

/**
 * A weight in fewer bits. `shape` and `dtype` are those of the stored codes; `weight.shape` is the shape that it stands for. It is never trained. Checkpoints
 * get its numbers: as bf16 for bf16, otherwise as f32.
 */
export class QuantizedParameter extends Parameter {
  #weight: QuantizedWeight

  /** Takes over the stored weight's memory. */
  constructor(weight: QuantizedWeight) {
    super(weight.q, { trainable: false })
    this.#weight = { ...weight, q: this, scale: keep(weight.scale) }
  }

  /** What `quantizedMatmul` takes. */
  get weight(): QuantizedWeight {
    return this.#weight
  }

  /** False: rounding would undo every small step. Setting it to true throws E_NO_GRADIENT. */
  override get trainable(): boolean {
    return false
  }

  /** @throws MoeError E_NO_GRADIENT: rounding would undo every small step. */
  override set trainable(value: boolean) {
    if (!value) return
    throw new MoeError({
      code: 'E_NO_GRADIENT',
      op: 'trainable',
      problem: `a weight stored in ${this.#weight.format} cannot be trained`,
      fix: 'train adapters beside it with addAdapters(module), or train the model in f32 and quantize afterwards',
    })
  }

  /** The numbers as f32. */
  dequantize(): Tensor {
    return scope(() => noGrad(() => dequantizeWeight(this.#weight)))
  }

  /** Stores the f32 numbers of `next`, which is used up. */
  override assign(next: Tensor): void {
    this.#store([this.#part(next)])
  }

  /** Stores f32 numbers that `read` gives as `count` parts of the first axis, so that only one of them is there in f32. The parts are used up. */
  async assignParts(count: number, read: (part: number) => Promise<Tensor> | Tensor): Promise<void> {
    const parts: QuantizedWeight[] = []
    const paced = pacer()
    try {
      for (let i = 0; i < count; i++) {
        parts.push(this.#part(await read(i)))
        await paced()
      }
      this.#store(parts)
    } catch (error) {
      parts.forEach(disposeStored)
      throw error
    }
  }

  /** Stores f32 numbers of the host, some rows of the first axis at a time. */
  async assignValues(values: Float32Array): Promise<void> {
    const { shape } = this.#weight
    const [count, ...inner] = shape
    const rows = rowsAtOnce(shape)
    const width = sizeOf(inner)
    await this.assignParts(Math.max(1, Math.ceil(count / rows)), part => {
      const [from, to] = [part * rows, Math.min(count, (part + 1) * rows)]
      return fromHost(values.subarray(from * width, to * width), [to - from, ...inner], 'f32', this.backend)
    })
  }

  #part(next: Tensor): QuantizedWeight {
    const { shape, format, block } = this.#weight
    if (!sameShape(next.shape.slice(1), shape.slice(1))) throw this.#misfit(next.shape)
    try {
      return keep(scope(() => noGrad(() => quantizeWeight(next, format, block))))
    } finally {
      next.dispose()
    }
  }

  #store(parts: readonly QuantizedWeight[]): void {
    const { shape, scale: before } = this.#weight
    const rows = parts.reduce((sum, part) => sum + part.shape[0], 0)
    if (rows !== shape[0]) throw this.#misfit([rows, ...shape.slice(1)])
    const { q, scale } = joined(parts)
    super.assign(q)
    before?.dispose()
    this.#weight = { ...this.#weight, scale }
    if (parts.length > 1) parts.forEach(disposeStored)
  }

  #misfit(shape: Shape): MoeError {
    const wanted = showShape(this.#weight.shape)
    const problem = `a weight ${wanted} cannot take ${showShape(shape)}`
    return new MoeError({ code: 'E_SHAPE', op: 'assign', problem })
  }

  override dispose(): void {
    this.#weight.scale?.dispose()
    super.dispose()
  }
}

function disposeStored({ q, scale }: QuantizedWeight): void {
  q.dispose()
  scale?.dispose()
}

/**
 * Rows of the first axis that are quantized together, about `numbers` of them: meanwhile they are there several times, as f32 and as i32. Matrices are cut
 * between blocks, of which the tallest have 128 rows; stacks between matrices.
 */
export function rowsAtOnce([, ...inner]: Shape, numbers = 2 ** 20): number {
  const step = inner.length === 1 ? 128 : 1
  return step * Math.max(1, Math.floor(numbers / (step * sizeOf(inner))))
}

/** A stored form of a parameter; the parameter itself is left alone. `numbers`: how many are quantized together, about. */
export const quantizedParameter = (parameter: Parameter, format: WeightFormat, numbers?: number): QuantizedParameter =>
  atOnce(quantizing(parameter, format, numbers))

/** Rows `from` to before `to` of the first axis; of a matrix `from` is where a block begins. */
export function storedRows(weight: QuantizedWeight, from: number, to: number): QuantizedWeight {
  const { q, scale, shape, block } = weight
  const step = shape.length === 2 ? block[0] : 1
  return {
    ...weight,
    shape: [to - from, ...shape.slice(1)],
    q: q.narrow(0, from, to),
    scale: scale?.narrow(0, from / step, Math.ceil(to / step)) ?? null,
  }
}

/** The same in steps. */
function* quantizing(
  parameter: Parameter,
  format: WeightFormat,
  numbers?: number,
): Generator<void, QuantizedParameter> {
  const { shape } = parameter
  const [count] = shape
  // To bf16 it is one cast, with nothing in between.
  const rows = format === 'bf16' ? count : rowsAtOnce(shape, numbers)
  const quantized = (from: number, to: number) =>
    keep(scope(() => noGrad(() => quantizeWeight(parameter.narrow(0, from, to), format))))
  if (count <= rows) return new QuantizedParameter(quantized(0, count))
  const parts: QuantizedWeight[] = []
  try {
    for (let from = 0; from < count; from += rows) {
      parts.push(quantized(from, Math.min(count, from + rows)))
      yield
    }
    return new QuantizedParameter({ ...parts[0], shape, ...joined(parts) })
  } finally {
    parts.forEach(disposeStored)
  }
}

/** Codes and scales of parts of the first axis. */
function joined(parts: readonly QuantizedWeight[]): Pick<QuantizedWeight, 'q' | 'scale'> {
  const whole = () => ({
    q: concat(parts.map(part => part.q)),
    scale: parts[0].scale === null ? null : concat(parts.map(part => part.scale as Tensor)),
  })
  return keep(scope(() => noGrad(whole)))
}

/** The shape that a parameter stands for. */
export const weightShape = (parameter: Parameter): Shape =>
  parameter instanceof QuantizedParameter ? parameter.weight.shape : parameter.shape

/** Whether the parameter's own numbers are all there is to it: in f32, with nothing beside them. */
export const isPlain = (parameter: Parameter): boolean =>
  !(parameter instanceof QuantizedParameter) && parameter.adapter === null

/** The weight that a parameter stands for, in f32 and with its adapter: the parameter itself where it is plain. */
export function denseWeight(parameter: Parameter): Tensor {
  const { adapter } = parameter
  const stored = parameter instanceof QuantizedParameter
  const base = stored ? parameter.dequantize() : parameter
  if (adapter === null) return base
  const { down, up, scale } = adapter
  const scaled = up.mul(scale)
  const product = scaled.matmul(down, { precision: 'f32' })
  const sum = base.add(product)
  spend(product)
  if (sum.node === null) scaled.dispose()
  if (stored) spend(base)
  return sum
}

/** How often what `denseWeight` gives has changed. */
export function weightVersion({ version, adapter }: Parameter): number {
  return adapter === null ? version : version + adapter.down.version + adapter.up.version
}

/** y + scale x A^T B^T, for rows x and what the weight itself makes of them, y, which is used up. */
function withAdapter(
  y: Tensor,
  x: Tensor,
  { down, up, scale }: Adapter,
  product: (x: Tensor, weight: Tensor) => Tensor,
): Tensor {
  // So few columns have no blocks of 128 for fp8.
  return withPrecision(widePrecision(), () => {
    const narrow = product(x, down)
    const scaled = narrow.mul(scale)
    spend(narrow)
    const wide = product(scaled, up)
    const sum = y.add(wide)
    spend(y)
    spend(wide)
    if (sum.node === null) scaled.dispose()
    return sum
  })
}

const byTransposed = (x: Tensor, weight: Tensor) => x.matmul(weight, { transposeB: true })

function plainLinear(x: Tensor, weight: Parameter): Tensor {
  if (weight instanceof QuantizedParameter) return quantizedMatmul(x, weight.weight)
  const [, features] = weight.shape
  if (x.shape[x.rank - 1] !== features)
    throw shapeError(
      'linear',
      `x has shape ${showShape(x.shape)}, the weight ${showShape(weight.shape)}`,
      `pass x [..., ${features}]`,
    )
  return byTransposed(x, weight)
}

/** x W^T: `x [..., K]`, `weight [N, K]` in f32 or stored, to `[..., N]`. With its adapter, if it has one. */
export function linear(x: Tensor, weight: Parameter): Tensor {
  needTensor('linear', 'x', x)
  const { adapter } = weight
  if (adapter === null) return plainLinear(x, weight)
  const lead = x.shape.slice(0, -1)
  const rows = x.rank === 2 ? x : x.reshape([sizeOf(lead), x.shape[x.rank - 1]])
  const y = withAdapter(plainLinear(rows, weight), rows, adapter, byTransposed)
  return x.rank === 2 ? y : y.reshape([...lead, y.shape[1]])
}

/** `groupedMatmul` of experts' weights `[E, N, K]` in f32 or stored. With their adapters, if they have some. */
export function groupedLinear(x: Tensor, weight: Parameter, offsets: Tensor): Tensor {
  const { adapter } = weight
  const y =
    weight instanceof QuantizedParameter
      ? quantizedGroupedMatmul(x, weight.weight, offsets)
      : groupedMatmul(x, weight, offsets)
  if (adapter === null) return y
  return withAdapter(y, x, adapter, (rows, by) => groupedMatmul(rows, by, offsets))
}

/** Rows of a table `[N, K]` in f32 or stored, as f32: `ids i32 [...]` to `[..., K]`. */
export function embeddingRows(weight: Parameter, ids: Tensor): Tensor {
  if (!(weight instanceof QuantizedParameter)) return weight.takeRows(ids)
  const { scale, shape, format, block } = weight.weight
  return scope(() => {
    const flat = ids.reshape([ids.size])
    const q = weight.takeRows(flat)
    const scales = scale?.takeRows(block[0] === 1 ? flat : flat.div(block[0])) ?? null
    const rows = dequantizeWeight({ format, block: [1, block[1]], shape: [ids.size, shape[1]], q, scale: scales })
    return rows.reshape([...ids.shape, shape[1]])
  })
}

/** Every module of a tree, each once. */
export function modulesOf(module: Module, found = new Set<Module>()): Set<Module> {
  if (found.has(module)) return found
  found.add(module)
  const visit = (value: unknown): void => {
    if (value instanceof Module) modulesOf(value, found)
    else if (Array.isArray(value)) value.forEach(visit)
  }
  Object.values(module).forEach(visit)
  return found
}

/**
 * Stores the weights of all linear layers, embeddings and experts of a module in fewer bits, one after another; norms, gates and biases stay f32. For
 * inference, or with adapters: stored weights are not trained, and optimizers made before still hold the old ones, which are freed. Already stored ones stay as they are. The
 * event loop goes on meanwhile; leave the module alone until it is done.
 */
export async function quantizeWeights(module: Module, format: WeightFormat): Promise<void> {
  const paced = pacer()
  const stored = new Map<Parameter, QuantizedParameter>()
  for (const part of modulesOf(module)) {
    const fields = part as unknown as Record<string, Parameter>
    for (const field of part.quantizable ?? []) {
      const parameter = fields[field]
      if (parameter instanceof QuantizedParameter) continue
      const known = stored.get(parameter)
      const quantized = known ?? (await inTurns(quantizing(parameter, format)))
      quantized.adapter = parameter.adapter
      if (known === undefined) parameter.dispose()
      stored.set(parameter, quantized)
      fields[field] = quantized
      await paced()
    }
  }
}

/** What the weights of a module take. */
export interface WeightBytes {
  /** Numbers that the weights stand for, buffers included. */
  readonly elements: number
  /** Bytes of codes and scales. */
  readonly bytes: number
}

/** Elements and bytes of a parameter, or of all parameters and buffers of a module. */
export function weightBytes(of: Module | Parameter): WeightBytes {
  if (of instanceof Module) {
    const all = namedParameters(of).map(({ parameter }) => weightBytes(parameter))
    const total = (key: keyof WeightBytes) => all.reduce((sum, one) => sum + one[key], 0)
    return { elements: total('elements'), bytes: total('bytes') }
  }
  const scale = of instanceof QuantizedParameter ? of.weight.scale : null
  return { elements: sizeOf(weightShape(of)), bytes: bytesOf(of) + (scale === null ? 0 : bytesOf(scale)) }
}

const bytesOf = ({ size, dtype }: Tensor): number => size * dtypeBytes[dtype]
