/**
 * @file Quantized parameters, and the layer functions that accept parameters with or without quantization and adapters.
 */
import type { Backend } from '../backend.ts'
import { attrError, needDtype, needTensor, shapeError } from '../checks.ts'
import { fromHost } from '../create.ts'
import { defaultBackend } from '../default-backend.ts'
import { dtypeBytes } from '../dtype.ts'
import { describe, MoeError } from '../errors.ts'
import { groupedMatmul } from '../fused/grouped-matmul.ts'
import {
  checkFormat,
  dequantizeWeight,
  type QuantizedWeight,
  quantizedGroupedMatmul,
  quantizedMatmul,
  quantizeWeight,
  storedAs,
} from '../fused/quantized-matmul.ts'
import type { WeightFormat } from '../ops.ts'
import { type Adapter, Parameter } from '../parameter.ts'
import { widePrecision, withPrecision } from '../precision.ts'
import { concat } from '../primitives.ts'
import { keep, scope } from '../scope.ts'
import { type Shape, sameShape, showShape, sizeOf } from '../shape.ts'
import { disposeRecorded, noGrad } from '../tape.ts'
import { Tensor } from '../tensor.ts'
import { pacer, runSync, runYielding } from '../turns.ts'
import { Module, namedParameters, needModule } from './module.ts'

/**
 * A quantized weight. `shape` and `dtype` are those of the stored codes; `weight.shape` is the original shape. It
 * cannot be trained. Checkpoints contain its values: as bf16 if the format is bf16, and as f32 otherwise.
 */
export class QuantizedParameter extends Parameter {
  #weight: QuantizedWeight

  /** Takes ownership of the quantized weight's memory. */
  constructor(weight: QuantizedWeight) {
    super(weight.q, { trainable: false })
    this.#weight = { ...weight, q: this, scale: keep(weight.scale) }
  }

  /** Creates a parameter whose elements are elsewhere, or still to be assigned. @internal */
  static unallocated(shape: Shape, format: WeightFormat, backend: Backend = defaultBackend()): QuantizedParameter {
    const { block, dtype, stored } = storedAs(shape, format)
    // No handle of a backend: it is replaced before anything can free it.
    const q = new Tensor(backend, {}, stored, dtype)
    const parameter = new QuantizedParameter({ format, block, shape, q, scale: null })
    parameter.handle = null
    return parameter
  }

  /** The quantized weight, as `quantizedMatmul` takes it. */
  get weight(): QuantizedWeight {
    return this.#weight
  }

  /** Always false, because rounding would undo every small step. Setting it to true throws E_NO_GRADIENT. */
  override get trainable(): boolean {
    return false
  }

  /** @throws MoeError E_NO_GRADIENT if set to true, because rounding would undo every small step */
  override set trainable(value: boolean) {
    if (!value) return
    throw new MoeError({
      code: 'E_NO_GRADIENT',
      op: 'trainable',
      problem: `a weight stored in ${this.#weight.format} cannot be trained`,
      fix: 'add adapters with addAdapters(module) and train those, or train the model in f32 and quantize it afterwards',
    })
  }

  /** Returns the values as f32. */
  dequantize(): Tensor {
    return scope(() => noGrad(() => dequantizeWeight(this.#weight)))
  }

  /** Quantizes the f32 values of `next` and stores them. `next` is disposed. */
  override assign(next: Tensor): void {
    this.#store([this.#part(next)])
  }

  /**
   * Stores a weight that is already quantized, in the format and blocks of this one, and takes ownership of it.
   * @throws MoeError E_SHAPE, E_ATTR
   */
  assignQuantized(next: QuantizedWeight): void {
    this.#store([this.#part(next)])
  }

  /**
   * Quantizes and stores f32 values that `read` returns in `count` parts along the first axis, so that only one part at
   * a time is in memory as f32. Parts that are already quantized, in the format and blocks of this weight, are stored as
   * they are. The parts are disposed. If memory runs out when all parts have been read, the weight is lost.
   */
  async assignParts(
    count: number,
    read: (part: number) => Promise<Tensor | QuantizedWeight> | Tensor | QuantizedWeight,
  ): Promise<void> {
    const parts: QuantizedWeight[] = []
    const paced = pacer()
    try {
      for (let i = 0; i < count; i++) {
        parts.push(this.#part(await read(i)))
        await paced()
      }
      this.#store(parts)
    } catch (error) {
      parts.forEach(disposeWeight)
      throw error
    }
  }

  /** Quantizes and stores f32 values from the host, some rows of the first axis at a time. */
  async assignValues(values: Float32Array): Promise<void> {
    const { shape, block } = this.#weight
    const [count, ...inner] = shape
    const rows = rowsPerChunk(shape, block)
    const width = sizeOf(inner)
    await this.assignParts(Math.max(1, Math.ceil(count / rows)), part => {
      const [from, to] = [part * rows, Math.min(count, (part + 1) * rows)]
      return fromHost(values.subarray(from * width, to * width), [to - from, ...inner], 'f32', this.backend)
    })
  }

  #part(next: Tensor | QuantizedWeight): QuantizedWeight {
    const { shape, format, block } = this.#weight
    if (!sameShape(next.shape.slice(1), shape.slice(1))) throw this.#misfit(next.shape)
    if ((next instanceof Tensor ? next : next.q).backend !== this.backend) {
      const problem = `the weight is on ${this.backend.name}, but the new elements are on another backend`
      throw shapeError('assign', problem, 'copy them with await x.to(parameter.backend)')
    }
    if (!(next instanceof Tensor)) {
      if (next.format === format && sameShape(next.block, block)) return keep(next)
      throw attrError(
        'assign',
        `the weight is stored in ${next.format}, blocks [${next.block}]`,
        `pass one in ${format}, blocks [${block}]`,
      )
    }
    try {
      return keep(scope(() => noGrad(() => quantizeWeight(next, format, block))))
    } finally {
      next.dispose()
    }
  }

  #store(parts: readonly QuantizedWeight[]): void {
    const { shape, block, scale: before } = this.#weight
    const rows = parts.reduce((sum, part) => sum + part.shape[0], 0)
    if (rows !== shape[0]) throw this.#misfit([rows, ...shape.slice(1)])
    const splits = parts.slice(0, -1).find(part => shape.length === 2 && part.shape[0] % block[0] !== 0)
    if (splits !== undefined) {
      const problem = `a part of ${splits.shape[0]} rows ends inside a block of ${block[0]} rows`
      throw shapeError('assign', problem, `pass parts of a multiple of ${block[0]} rows`)
    }
    // The old codes are freed first, so that there are at most two copies: the parts and their concatenation.
    this.freeElements()
    before?.dispose()
    const { q, scale } = concatParts(parts)
    super.assign(q)
    this.#weight = { ...this.#weight, scale }
    if (parts.length > 1) parts.forEach(disposeWeight)
  }

  #misfit(shape: Shape): MoeError {
    const wanted = showShape(this.#weight.shape)
    const problem = `a weight of shape ${wanted} cannot take elements of shape ${showShape(shape)}`
    return shapeError('assign', problem, `pass a tensor of shape ${wanted}`)
  }

  override dispose(): void {
    this.#weight.scale?.dispose()
    super.dispose()
  }
}

function disposeWeight({ q, scale }: QuantizedWeight): void {
  q.dispose()
  scale?.dispose()
}

/**
 * Returns how many rows of the first axis to quantize at a time: about `numbers` elements, because they are in memory
 * several times meanwhile, as f32 and i32. Matrices are split between blocks, and stacks between matrices.
 */
export function rowsPerChunk([, ...inner]: Shape, [blockRows]: QuantizedWeight['block'], numbers = 2 ** 20): number {
  const step = inner.length === 1 ? blockRows : 1
  return step * Math.max(1, Math.floor(numbers / (step * sizeOf(inner))))
}

/** Returns a quantized copy of a parameter. `numbers`: approximate number of elements to quantize at a time. */
export const quantizedParameter = (parameter: Parameter, format: WeightFormat, numbers?: number): QuantizedParameter =>
  runSync(quantizing(parameter, format, numbers))

/**
 * Makes `copy` a copy of rows `from` to `to - 1` of a parameter of the same kind. Rows of a quantized matrix must be
 * whole blocks. A parameter without memory is not read: the copy reads its rows when it is materialized.
 * @internal
 */
export function copyRows(copy: Parameter, parameter: Parameter, from: number, to: number): void {
  const { elsewhere } = parameter
  if (parameter.handle === null && elsewhere !== null)
    copy.elsewhere = (first, end) => elsewhere(from + first, from + end)
  else if (parameter instanceof QuantizedParameter && copy instanceof QuantizedParameter)
    copy.assignQuantized(keep(scope(() => noGrad(() => detached(quantizedRows(parameter.weight, from, to))))))
  // Detached, because all rows are the parameter itself, which `assign` would empty.
  else copy.assign(scope(() => noGrad(() => parameter.narrow(0, from, to).detach())))
}

const detached = (weight: QuantizedWeight): QuantizedWeight => ({
  ...weight,
  q: weight.q.detach(),
  scale: weight.scale?.detach() ?? null,
})

/** Returns rows `from` to `to - 1` of the first axis. For a matrix, `from` must be the start of a block. */
export function quantizedRows(weight: QuantizedWeight, from: number, to: number): QuantizedWeight {
  const { q, scale, shape, block } = weight
  const step = shape.length === 2 ? block[0] : 1
  return {
    ...weight,
    shape: [to - from, ...shape.slice(1)],
    q: q.narrow(0, from, to),
    scale: scale?.narrow(0, from / step, Math.ceil(to / step)) ?? null,
  }
}

/** Quantizes in steps, for `quantizedParameter` and `quantizeWeights`. */
function* quantizing(
  parameter: Parameter,
  format: WeightFormat,
  numbers?: number,
): Generator<void, QuantizedParameter> {
  const { shape } = parameter
  const [count] = shape
  // bf16 needs only a cast, without intermediate results.
  const rows = format === 'bf16' ? count : rowsPerChunk(shape, storedAs(shape, format).block, numbers)
  const quantized = (from: number, to: number) =>
    keep(scope(() => noGrad(() => quantizeWeight(parameter.narrow(0, from, to), format))))
  if (count <= rows) return new QuantizedParameter(quantized(0, count))
  const parts: QuantizedWeight[] = []
  try {
    for (let from = 0; from < count; from += rows) {
      parts.push(quantized(from, Math.min(count, from + rows)))
      yield
    }
    return new QuantizedParameter({ ...parts[0], shape, ...concatParts(parts) })
  } finally {
    parts.forEach(disposeWeight)
  }
}

/** Concatenates codes and scales along the first axis. */
function concatParts(parts: readonly QuantizedWeight[]): Pick<QuantizedWeight, 'q' | 'scale'> {
  const whole = () => ({
    q: concat(parts.map(part => part.q)),
    scale: parts[0].scale === null ? null : concat(parts.map(part => part.scale as Tensor)),
  })
  return keep(scope(() => noGrad(whole)))
}

/** The original shape of a parameter, before quantization. */
export const weightShape = (parameter: Parameter): Shape =>
  parameter instanceof QuantizedParameter ? parameter.weight.shape : parameter.shape

/** Returns whether a parameter is an ordinary f32 weight: neither quantized nor with an adapter. */
export const isPlain = (parameter: Parameter): boolean =>
  !(parameter instanceof QuantizedParameter) && parameter.adapter === null

/**
 * Returns the effective weight of a parameter in f32, including its adapter. For a plain parameter, this is the
 * parameter itself.
 */
export function denseWeight(parameter: Parameter): Tensor {
  const { adapter } = parameter
  const stored = parameter instanceof QuantizedParameter
  const base = stored ? parameter.dequantize() : parameter
  if (adapter === null) return base
  const { down, up, scale } = adapter
  const scaled = up.mul(scale)
  const product = scaled.matmul(down, { precision: 'f32' })
  const sum = base.add(product)
  disposeRecorded(product)
  if (sum.node === null) scaled.dispose()
  if (stored) disposeRecorded(base)
  return sum
}

/** Returns a number that changes whenever the result of `denseWeight` does. */
export function weightVersion({ version, adapter }: Parameter): number {
  return adapter === null ? version : version + adapter.down.version + adapter.up.version
}

/** Returns y + scale x A^T B^T, where y is the product of x and the base weight. Disposes of y. */
function withAdapter(
  y: Tensor,
  x: Tensor,
  { down, up, scale }: Adapter,
  product: (x: Tensor, weight: Tensor) => Tensor,
): Tensor {
  // The rank is too small for the fp8 blocks of 128 columns.
  return withPrecision(widePrecision(), () => {
    const narrow = product(x, down)
    const scaled = narrow.mul(scale)
    disposeRecorded(narrow)
    const wide = product(scaled, up)
    const sum = y.add(wide)
    disposeRecorded(y)
    disposeRecorded(wide)
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

/**
 * Linear layer: x W^T for `x [..., K]` and `weight [N, K]`, giving `[..., N]`. The weight may be f32 or quantized, and
 * may have an adapter.
 * @throws MoeError E_SHAPE, E_ATTR
 */
export function linear(x: Tensor, weight: Parameter): Tensor {
  needTensor('linear', 'x', x)
  needDtype('linear', 'x', x, 'f32')
  if (x.rank === 1) return linear(x.reshape([1, x.size]), weight).reshape([-1])
  const { adapter } = weight
  if (adapter === null) return plainLinear(x, weight)
  const lead = x.shape.slice(0, -1)
  const rows = x.rank === 2 ? x : x.reshape([sizeOf(lead), x.shape[x.rank - 1]])
  const y = withAdapter(plainLinear(rows, weight), rows, adapter, byTransposed)
  return x.rank === 2 ? y : y.reshape([...lead, y.shape[1]])
}

/**
 * `linear` for outputs `from` to `to - 1` only, without gradients for the weight. They must be whole blocks of rows of a
 * quantized weight: multiples of `rowsPerBlock(weight)`.
 * @internal
 */
export function linearRows(x: Tensor, weight: Parameter, from: number, to: number): Tensor {
  const part = (rows: Tensor) => rows.detach().narrow(0, from, to)
  const product = (input: Tensor) =>
    weight instanceof QuantizedParameter
      ? quantizedMatmul(input, quantizedRows(weight.weight, from, to))
      : byTransposed(input, part(weight))
  const { adapter } = weight
  if (adapter === null) return product(x)
  const { down, up, scale } = adapter
  const own = (input: Tensor, by: Tensor) => byTransposed(input, by === up ? part(up) : by)
  return withAdapter(product(x), x, { down, up, scale }, own)
}

/** Rows of a matrix that share a scale. @internal */
export const rowsPerBlock = (weight: Parameter): number =>
  weight instanceof QuantizedParameter ? weight.weight.block[0] : 1

/**
 * `groupedMatmul` for weights of experts `[E, N, K]`, which may be f32 or quantized, and may have adapters.
 * @throws MoeError E_SHAPE, E_DTYPE
 */
export function groupedLinear(x: Tensor, weight: Parameter, offsets: Tensor): Tensor {
  const { adapter } = weight
  const y =
    weight instanceof QuantizedParameter
      ? quantizedGroupedMatmul(x, weight.weight, offsets)
      : groupedMatmul(x, weight, offsets)
  if (adapter === null) return y
  return withAdapter(y, x, adapter, (rows, by) => groupedMatmul(rows, by, offsets))
}

/** Looks up rows of a table `[N, K]`, f32 or quantized: `ids i32 [...]` to f32 `[..., K]`. */
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

/** Returns every module of a tree once. */
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
 * Quantizes the weights of all linear layers, embeddings and experts of a module, one after another; norms, gates and
 * biases stay f32. Weights that are already quantized stay as they are.
 *
 * For inference or training with adapters: quantized weights cannot be trained, and an optimizer created before still
 * refers to the old weights, which are freed. The event loop keeps running meanwhile; do not use the module until the
 * promise resolves.
 */
export async function quantizeWeights(module: Module, format: WeightFormat): Promise<void> {
  checkFormat('quantizeWeights', format)
  needModule('quantizeWeights', module)
  const paced = pacer()
  const stored = new Map<Parameter, QuantizedParameter>()
  for (const part of modulesOf(module)) {
    const fields = part as unknown as Record<string, Parameter>
    for (const field of part.quantizable ?? []) {
      const parameter = fields[field]
      if (parameter instanceof QuantizedParameter) continue
      const known = stored.get(parameter)
      const quantized = known ?? (await runYielding(quantizing(parameter, format)))
      quantized.adapter = parameter.adapter
      if (known === undefined) parameter.dispose()
      stored.set(parameter, quantized)
      fields[field] = quantized
      await paced()
    }
  }
}

/** Size of the weights of a module. */
export interface WeightBytes {
  /** Number of weights and buffer elements, before quantization. */
  readonly elements: number
  /** Bytes of memory, including codes and scales. */
  readonly bytes: number
}

/** Returns the number of elements and bytes of a parameter, or of all parameters and buffers of a module. */
export function weightBytes(of: Module | Parameter): WeightBytes {
  if (of instanceof Module) {
    const all = namedParameters(of).map(({ parameter }) => weightBytes(parameter))
    const total = (key: keyof WeightBytes) => all.reduce((sum, one) => sum + one[key], 0)
    return { elements: total('elements'), bytes: total('bytes') }
  }
  if (!(of instanceof Parameter)) {
    throw attrError('weightBytes', `expected a module or a parameter, got ${describe(of)}`, 'pass one of them')
  }
  const scale = of instanceof QuantizedParameter ? of.weight.scale : null
  return { elements: sizeOf(weightShape(of)), bytes: bytesOf(of) + (scale === null ? 0 : bytesOf(scale)) }
}

const bytesOf = ({ size, dtype }: Tensor): number => size * dtypeBytes[dtype]
