/**
 * @file A step whose ops are recorded once and then replayed. In JavaScript, each replay only uploads a batch and
 *   downloads a few numbers.
 */
import {
  type Backend,
  backward,
  concat,
  full,
  type Graph,
  type Handle,
  isMoeError,
  keep,
  noGrad,
  type Parameter,
  type Precision,
  reduceGradients,
  scope,
  type Tensor,
  tensor,
  withPrecision,
  zeros,
} from '@moe/core'
import type { DeviceInputs, HostInputs, StagedStep, TokenBatch } from './model.ts'
import { clipScale, gradientNorm, gradientNormParts } from './optim/clip.ts'
import { type StagedOptimizer, zeroState } from './optim/optimizer.ts'
import { gatherPasses, normOverRanks, type RecordableRanks } from './ranks.ts'
import type { ShardedUpdate } from './sharded-update.ts'
import { average, factorOf, type StepNumbers, weightOf } from './step-numbers.ts'

/** A backend that supports recording. */
export type Recorder = Backend & Required<Pick<Backend, 'capture' | 'write'>>

/** What all recorded steps of a run share. */
export interface StepParts {
  readonly backend: Recorder
  readonly staged: StagedStep
  /** All parameters of the model, including buffers. */
  readonly parameters: readonly Parameter[]
  readonly optimizer: StagedOptimizer
  readonly clip: number
  readonly precision: Precision
  /** Ranks that take every step together. Other ranks may run a step op by op while this one replays it. */
  readonly ranks: RecordableRanks | null
  /** This rank's shard of the update, if the optimizer is sharded. */
  readonly sharded: ShardedUpdate | null
}

/** The inputs of a micro-batch, ready for upload. */
export type PreparedBatch = ReturnType<StagedStep['inputs']> & Pick<TokenBatch, 'rows' | 'length'>

/** The inputs of a micro-batch and of its step. */
export type StagedBatch = PreparedBatch & { readonly kind?: string }

type HostValues = ReadonlyArray<Float32Array | Int32Array>

/** A step after its passes and before its update. */
export interface MeasuredStep {
  readonly numbers: Omit<StepNumbers, 'after'>
  /** Sums of `carried` over the micro-batches: of this rank before `sumCarried`, of all ranks after it. */
  readonly carried: HostValues
}

interface PassResult {
  readonly metrics: readonly string[]
  /** Loss, summed negative log-likelihood, then metrics. */
  readonly scalars: Tensor
  readonly carried: readonly Tensor[]
  readonly gradients: ReadonlyArray<Tensor | null>
}

/** Identifies steps that run the same ops; null if the micro-batches of the step differ. */
export function kindOf(batches: readonly StagedBatch[]): string | null {
  const [kind, ...others] = batches.map(({ arrays, kind = '' }) =>
    [kind, ...Object.entries(arrays).map(([name, { shape }]) => `${name} ${shape.join('x')}`)].join(),
  )
  return others.every(other => other === kind) ? `${batches.length === 1 ? 'one' : 'several'}: ${kind}` : null
}

/**
 * Records three graphs: forward and backward pass of a micro-batch; norm and clipping; the update. The host reads the
 * numbers of the first two before it launches the third. The gradients of a single micro-batch stay where the first
 * graph leaves them; those of several are accumulated in separate memory.
 */
export class RecordedStep {
  readonly #parts: StepParts
  readonly #trained: readonly Parameter[]
  /** Whether a step has more than one micro-batch on this rank. */
  readonly #several: boolean
  readonly #inputs: DeviceInputs
  readonly #seed: Tensor
  readonly #factor: Tensor
  readonly #sums: readonly Parameter[]
  readonly #pass: Graph<PassResult>
  /** The parameters that this rank's optimizer updates: all trained ones, or a shard. */
  readonly #updated: readonly Parameter[]
  /** Gradients of the updated parameters, as the update reads them. */
  readonly #gradients: ReadonlyArray<Tensor | null>
  readonly #norm: Graph<{ norm: Tensor; gradScale: Tensor | null }>
  /** Gradient norm over all ranks, if the optimizer is sharded. */
  readonly #wholeNorm: Tensor
  #update: { graph: Graph<unknown>; numbers: Tensor; inputs: DeviceInputs; carried: readonly Tensor[] } | null = null
  readonly #state: readonly Tensor[]
  readonly #handles: readonly Handle[]

  /** Records the passes for batches like `batch`. @param several whether steps have more than one micro-batch */
  constructor(parts: StepParts, batch: StagedBatch, several: boolean) {
    const { backend, parameters, optimizer, sharded } = parts
    this.#parts = parts
    this.#several = several
    this.#trained = parameters.filter(parameter => parameter.trainable)
    this.#updated = sharded === null ? this.#trained : sharded.shard.parameters.map(({ parameter }) => parameter)
    try {
      // The shards of parameters keep memory of their own as long as the graphs exist.
      sharded?.shard.takeRows()
      this.#state = [...new Set([...parameters, ...this.#updated, ...optimizer.state])]
      this.#handles = this.#state.map(({ handle }) => handle)
      this.#inputs = keep(this.#upload(batch.arrays))
      this.#seed = keep(full([], 1, { backend }))
      this.#factor = keep(full([], 1, { backend }))
      this.#wholeNorm = keep(full([], 0, { backend }))
      this.#sums = several ? zeroState(this.#trained) : []
      this.#pass = this.#recordPass()
      const { gradients } = this.#pass.result
      this.#gradients = sharded === null ? gradients : keep(sharded.shard.places(this.#ownGradient))
      this.#norm = this.#recordNorm()
    } catch (error) {
      this.dispose()
      throw error
    }
  }

  /**
   * Whether all tensors are still at the addresses that the graphs use, and the same parameters are trainable. Other
   * code may have assigned to parameters or frozen some.
   */
  get valid(): boolean {
    const trained = this.#parts.parameters.filter(({ trainable }) => trainable)
    return (
      this.#state.every(({ handle }, i) => handle === this.#handles[i]) &&
      trained.length === this.#trained.length &&
      trained.every((parameter, i) => parameter === this.#trained[i])
    )
  }

  /**
   * Runs the passes of all micro-batches, without changing any parameter. They have been launched when this returns its
   * promise.
   */
  async measure(batches: readonly StagedBatch[]): Promise<MeasuredStep> {
    const { backend, ranks } = this.#parts
    const weights = batches.map(batch => weightOf(batch.count, batch, this.#several || (ranks?.size ?? 1) > 1))
    const { metrics, scalars, carried } = this.#pass.result
    const reads = batches.map(({ arrays }, i) => {
      write(backend, this.#inputs, arrays)
      backend.write(this.#seed, Float32Array.of(weights[i]))
      this.#pass.replay()
      // The read is ordered before any later launch.
      const read = Promise.all([scalars, ...carried].map(values))
      // If a launch fails before anybody awaits this, that error is reported.
      read.catch(() => undefined)
      return read
    })
    const all = ranks && (await this.#reduceOverRanks(ranks, batches, await Promise.all(reads)))
    const factor = factorOf(all?.map(({ weight }) => weight) ?? weights)
    backend.write(this.#factor, Float32Array.of(factor))
    this.#norm.replay()
    const [norm, ...read] = await Promise.all([this.#readNorm(), ...reads])
    const passes = all ?? read.map(([own], i) => ({ count: batches[i].count, metrics, values: own }))
    const sums = carried.map((_, at) => sumOf(read.map(own => own[at + 1])))
    return { numbers: average(passes, norm, factor), carried: sums }
  }

  async #readNorm(): Promise<number> {
    const { backend, sharded } = this.#parts
    if (sharded === null) return (await values(this.#norm.result.norm))[0]
    const norm = await normOverRanks(sharded.ranks, this.#norm.result.norm)
    backend.write(this.#wholeNorm, Float32Array.of(norm))
    return norm
  }

  /**
   * Sums the gradients over all ranks (or those of this rank's shard), and gathers the numbers of all micro-batches.
   */
  async #reduceOverRanks(ranks: RecordableRanks, batches: readonly StagedBatch[], read: readonly HostValues[]) {
    const { backend, sharded } = this.#parts
    const { metrics, gradients } = this.#pass.result
    const own = read.map(([numbers], i) => {
      const { count } = batches[i]
      return { count, batch: batches[i], metrics, values: tensor(numbers, undefined, { backend }) }
    })
    try {
      const all = await gatherPasses(ranks, own)
      if (sharded !== null) {
        await sharded.shard.sums(this.#ownGradient, this.#gradients)
        return all
      }
      for (const [i, parameter] of this.#trained.entries()) parameter.grad = gradients[i]
      await reduceGradients(this.#trained, async group => void (await ranks.allReduceInPlace(group)))
      return all
    } finally {
      for (const parameter of this.#trained) parameter.grad = null
      for (const { values } of own) values.dispose()
    }
  }

  /** Sums `carried` over all ranks, for a step that will be applied. */
  async sumCarried(measured: MeasuredStep): Promise<MeasuredStep> {
    const { backend, ranks } = this.#parts
    const { carried: like } = this.#pass.result
    if (ranks === null || like.length === 0) return measured
    const own = like.map(({ shape }, i) => tensor(measured.carried[i], shape, { backend }))
    const sums = await ranks.allReduce(own).finally(() => {
      for (const tensor of own) tensor.dispose()
    })
    const carried = await Promise.all(sums.map(values)).finally(() => {
      for (const tensor of sums) tensor.dispose()
    })
    return { ...measured, carried }
  }

  /** The gradient that `measure` left for a parameter of the optimizer. It is not in the parameter's `grad`. */
  gradientOf(parameter: Parameter): Tensor | null {
    return this.#gradients[this.#updated.indexOf(parameter)] ?? null
  }

  /** The gradient that this rank's passes leave for a parameter of the model. */
  readonly #ownGradient = (parameter: Parameter): Tensor | null =>
    this.#pass.result.gradients[this.#trained.indexOf(parameter)] ?? null

  /**
   * Applies the gradients that `measure` left, on all ranks.
   *
   * @returns false if there was not enough memory to record the update next to the other graphs. The update was then
   *   run op by op, after freeing those graphs, and this recording can no longer be used
   */
  async apply({ carried }: MeasuredStep, lr: number): Promise<boolean> {
    const { backend, staged, optimizer, parameters, sharded } = this.#parts
    const { numbers, updates } = optimizer.begin(lr)
    const inputs = staged.afterInputs()
    if (this.#update === null) {
      this.#update = this.#recordUpdate(numbers, inputs, carried)
      if (this.#update === null) {
        await sharded?.shard.gather()
        return false
      }
    } else {
      backend.write(this.#update.numbers, numbers)
      write(backend, this.#update.inputs, inputs)
      // For a single micro-batch, `carried` is still where its pass left it.
      if (this.#carriesSums) for (const [i, tensor] of this.#update.carried.entries()) backend.write(tensor, carried[i])
    }
    this.#update.graph.replay(updates)
    for (const parameter of parameters) parameter.version++
    await sharded?.shard.gather()
    return true
  }

  /** Whether `carried` is uploaded by the host, which sums it over several passes. */
  get #carriesSums(): boolean {
    return this.#several || this.#parts.ranks !== null
  }

  #upload(inputs: HostInputs): DeviceInputs {
    const { backend } = this.#parts
    const upload = ({ data, shape }: HostInputs[string]) => tensor(data, shape, { backend })
    return scope(() => Object.fromEntries(Object.entries(inputs).map(([name, array]) => [name, upload(array)])))
  }

  #recordPass(): Graph<PassResult> {
    const { backend, staged, precision } = this.#parts
    const record = (): PassResult => {
      for (const [i, sum] of this.#sums.entries()) this.#trained[i].grad = sum
      const { loss, nll, metrics, carried } = staged.loss(this.#inputs)
      backward(loss, { gradient: this.#seed })
      const numbers = [loss, nll, ...Object.values(metrics)].map(number => number.detach().reshape([1]))
      const scalars = noGrad(() => concat(numbers))
      return { metrics: Object.keys(metrics), scalars, carried, gradients: this.#takeGradients() }
    }
    try {
      return backend.capture(() => keep(scope(() => withPrecision(precision, record))), {
        state: [...this.#state, ...this.#sums],
      })
    } finally {
      // There are gradients only if recording failed.
      for (const parameter of this.#trained) parameter.zeroGrad()
    }
  }

  /**
   * The gradients that `backward` left, or the sums that they were added to; null for parameters that no loss depends
   * on. Each has its own memory, because ranks write sums to it: an op such as `add` passes the gradient of its result
   * to both inputs.
   */
  #takeGradients(): Array<Tensor | null> {
    const handles = new Set<unknown>()
    return this.#trained.map((parameter, i) => {
      const { grad } = parameter
      parameter.grad = null
      if (grad === null) return null
      if (!this.#several) {
        const shared = handles.has(grad.handle)
        handles.add(grad.handle)
        return shared ? copyOf(grad) : grad
      }
      const sum = this.#sums[i]
      if (grad === sum) return null
      sum.assign(grad)
      return sum
    })
  }

  /** Runs `fn` with the gradients assigned to the updated parameters. */
  #withGradients<T>(fn: () => T): T {
    for (const [i, parameter] of this.#updated.entries()) parameter.grad = this.#gradients[i]
    try {
      return fn()
    } finally {
      for (const parameter of this.#updated) parameter.grad = null
    }
  }

  /**
   * Records the norm and the clipping scale. If the optimizer is sharded, only this rank's part of the norm: the host
   * combines the parts, and the update computes the scale.
   */
  #recordNorm() {
    const { backend, clip, sharded } = this.#parts
    const record = () => {
      if (sharded !== null) return { norm: gradientNormParts(this.#gradients, backend), gradScale: null }
      const norm = gradientNorm(this.#trained)
      return { norm: norm.reshape([1]), gradScale: clipScale(norm, clip, this.#factor) }
    }
    return this.#withGradients(() => backend.capture(() => keep(scope(() => noGrad(record)))))
  }

  #recordUpdate(numbersNow: Float32Array, inputsNow: HostInputs, carriedNow: HostValues) {
    const { backend, staged, optimizer, clip, sharded } = this.#parts
    const left = this.#pass.result.carried
    const { numbers, inputs, carried } = keep(
      scope(() => ({
        numbers: tensor(numbersNow, undefined, { backend }),
        inputs: this.#upload(inputsNow),
        carried: this.#carriesSums ? left.map(({ shape }, i) => tensor(carriedNow[i], shape, { backend })) : left,
      })),
    )
    const update = () => {
      sharded?.shard.takeRows()
      optimizer.update(numbers, this.#norm.result.gradScale ?? clipScale(this.#wholeNorm, clip, this.#factor))
      staged.after(inputs, carried)
      for (const sum of this.#sums) sum.assign(zeros(sum.shape, sum))
    }
    const run = () => scope(() => noGrad(update))
    try {
      const graph = this.#withGradients(() => backend.capture(run, { state: [...this.#state, ...this.#sums] }))
      return { graph, numbers, inputs, carried }
    } catch (error) {
      try {
        if (!isMoeError(error, 'E_OUT_OF_MEMORY')) throw error
        // Disposing the graphs frees their working memory, but not the tensors that they returned.
        for (const graph of [this.#pass, this.#norm]) graph.dispose()
        this.#withGradients(run)
        return null
      } finally {
        for (const tensor of [numbers, ...Object.values(inputs), ...carried]) tensor.dispose()
      }
    }
  }

  dispose(): void {
    // Fields are undefined if recording failed before they were set.
    const { scalars, carried = [], gradients = [] } = this.#pass?.result ?? {}
    const { norm, gradScale } = this.#norm?.result ?? {}
    const update = this.#update
    const updating = update === null ? [] : [update.numbers, ...Object.values(update.inputs), ...update.carried]
    const inputs = [...Object.values(this.#inputs ?? {}), this.#seed, this.#factor, this.#wholeNorm, ...updating]
    const left = new Set([...gradients, ...(this.#gradients ?? []), ...(this.#sums ?? [])])
    for (const tensor of [scalars, ...carried, norm, gradScale, ...inputs, ...left]) tensor?.dispose()
    this.#parts.sharded?.shard.freeRows()
    for (const graph of [this.#pass, this.#norm, update?.graph]) graph?.dispose()
  }
}

/** Returns a copy of a gradient and disposes of it. */
function copyOf(gradient: Tensor): Tensor {
  const copy = noGrad(() => gradient.mul(1))
  gradient.dispose()
  return copy
}

const values = (tensor: Tensor) => tensor.values() as Promise<Float32Array | Int32Array>

function write(backend: Recorder, tensors: DeviceInputs, inputs: HostInputs): void {
  for (const name in tensors) backend.write(tensors[name], inputs[name].data)
}

function sumOf(arrays: HostValues): Float32Array | Int32Array {
  const [first, ...others] = arrays
  const sum = first.slice()
  for (const other of others) for (let i = 0; i < sum.length; i++) sum[i] += other[i]
  return sum
}
