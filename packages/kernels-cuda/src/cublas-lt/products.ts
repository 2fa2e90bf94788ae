/**
 * @file Dense products by cuBLASLt, which stores matrices by columns, while ours are stored by rows. Our c = a b is therefore computed as
 * c^T = b^T a^T: b comes first, and a matrix stored by rows is its transpose stored by columns.
 */
import { MoeError, type WidePrecision } from '@moe/core'
import type { Driver } from '../driver/driver.ts'
import type { Matrix, Product } from '../matrix.ts'
import type { Memory } from '../memory.ts'
import type { Stream } from '../stream.ts'
import { fastest } from './fastest.ts'
import type { CublasLtLibrary } from './library.ts'

// Constants of cublasLt.h, cublas_api.h and library_types.h in 13.1.1; the same since 12.0.
const success = 0
const notSupported = 15
const compute32F = 68
const types: { readonly [P in WidePrecision]: number } = { f32: 0, bf16: 14 }
const descriptionAttribute = { transA: 3, transB: 4 } as const
const layoutAttribute = { batchCount: 5, batchStride: 6 } as const
const preferenceAttribute = {
  workspaceBytes: 1,
  reductionSchemes: 3,
  alignmentA: 5,
  alignmentB: 6,
  alignmentC: 7,
  alignmentD: 8,
} as const
/** Sum over k in one pass, or in f32 parts that a second kernel adds in order. Other schemes let parts take turns in the output. */
const reductionComputeType = 2
/** Layout of cublasLtMatmulHeuristicResult_t: a cublasLtMatmulAlgo_t of 64 bytes, size_t workspaceSize, int state, float, int[4]. */
const result = { bytes: 96, workspace: 64, state: 72 } as const

/** NVIDIA's recommendation for Hopper; on other devices the heuristic uses less. */
const mostWorkspaceBytes = 2 ** 25
/** Number of algorithms to measure. */
const mostAlgorithms = 4
/** Number of cached plans. Tests make it small. */
export const limits = { plans: 1024 }

interface Algorithm {
  /** Address of its cublasLtMatmulAlgo_t. */
  readonly address: number
  readonly workspaceBytes: number
}

/** Handles that describe a product. */
interface Described {
  readonly description: number
  readonly layouts: { readonly a: number; readonly b: number; readonly c: number }
}

interface Plan extends Described {
  /** The heuristic's results, which contain the algorithms. */
  readonly results: ArrayBuffer
  /** Fastest first, according to the heuristic. Empty if it supports no algorithm. */
  readonly algorithms: readonly Algorithm[]
  /** Index of the chosen algorithm, or `own`; undefined until measured. */
  choice: number | undefined
}
const own = -1

/** A product without its output. */
interface Asked {
  readonly precision: WidePrecision
  readonly a: Matrix
  readonly b: Matrix
  readonly product: Product
}

/** Computes the product with our own kernels. */
export type OwnProduct = (c: number, add: boolean) => void

export interface CublasLtOptions {
  /** Measure our kernel and the algorithms at the first product of each size, instead of using the heuristic's first. */
  readonly measured: boolean
  /** Whether a graph is being captured. */
  readonly recording: () => boolean
}

export class CublasLt {
  readonly version: string
  readonly #library: CublasLtLibrary
  readonly #driver: Driver
  readonly #memory: Memory
  readonly #stream: Stream
  readonly #options: CublasLtOptions
  readonly #plans = new Map<string, Plan>()
  /** Values of alpha and beta, 0 and 1, which are read at the call. */
  readonly #scalars = Float32Array.of(0, 1)
  readonly #zero: number
  readonly #word = new BigUint64Array(1)
  #disposed = false

  constructor(library: CublasLtLibrary, driver: Driver, memory: Memory, stream: Stream, options: CublasLtOptions) {
    this.version = library.version
    this.#library = library
    this.#driver = driver
    this.#memory = memory
    this.#stream = stream
    this.#options = options
    this.#zero = driver.address(this.#scalars.buffer)
  }

  /**
   * Computes c = a b (or c += a b) with cuBLASLt or `ownProduct`. c must be contiguous, and no size may be zero.
   * @throws MoeError E_BACKEND with the op, the shapes and cuBLASLt's status
   */
  multiply(precision: WidePrecision, c: number, a: Matrix, b: Matrix, product: Product, ownProduct: OwnProduct): void {
    const asked = { precision, a, b, product }
    const { add = false } = product
    const plan = this.#plan(asked, c)
    if (plan.choice === undefined && !this.#options.recording()) {
      plan.choice = this.#measure(plan, asked, c, ownProduct)
    }
    const algorithm = plan.algorithms[plan.choice ?? own]
    if (algorithm === undefined) ownProduct(c, add)
    else this.#run(plan, algorithm, this.#workspace(algorithm.workspaceBytes), asked, c, add)
  }

  /** Frees everything, once all work is done. Never throws. */
  dispose(): void {
    if (this.#disposed) return
    this.#disposed = true
    for (const plan of this.#plans.values()) this.#destroy(plan)
    this.#plans.clear()
    this.#library.call.cublasLtDestroy(this.#library.handle)
  }

  #run(plan: Plan, algorithm: Algorithm, workspace: number, asked: Asked, c: number, add: boolean): void {
    const { description, layouts } = plan
    const one = this.#zero + 4
    const code = this.#library.call.cublasLtMatmul(
      this.#library.handle,
      description,
      one,
      asked.b.pointer,
      layouts.b,
      asked.a.pointer,
      layouts.a,
      add ? one : this.#zero,
      c,
      layouts.c,
      c,
      layouts.c,
      algorithm.address,
      workspace,
      algorithm.workspaceBytes,
      this.#stream.handle,
    )
    if (code !== success) throw this.#failure(code, asked)
    this.#stream.countLaunch()
  }

  #workspace(bytes: number): number {
    return bytes > 0 ? this.#memory.scratch(bytes).pointer : 0
  }

  /** Index of the fastest algorithm, or `own`. Waits for the device. */
  #measure(plan: Plan, asked: Asked, c: number, ownProduct: OwnProduct): number {
    const { m, n, batch = 1, add = false } = asked.product
    // With `add`, the contents of c are still needed.
    const to = add ? this.#memory.scratch(batch * m * n * 4).pointer : c
    const workspace = this.#workspace(Math.max(...plan.algorithms.map(({ workspaceBytes }) => workspaceBytes)))
    const candidates = [
      () => ownProduct(to, false),
      ...plan.algorithms.map(algorithm => () => this.#run(plan, algorithm, workspace, asked, to, false)),
    ]
    return fastest(candidates, candidate => this.#stream.milliseconds(candidate)) + own
  }

  #plan(asked: Asked, c: number): Plan {
    const { precision, a, b, product } = asked
    const { m, n, k, transposeA, transposeB, batch = 1 } = product
    const alignments = [a.pointer, b.pointer, c].map(alignmentOf)
    const key = `${precision} ${m} ${n} ${k} ${batch} ${transposeA} ${transposeB} ${a.ld} ${b.ld} ${alignments}`
    const known = this.#plans.get(key)
    if (known !== undefined) return known
    if (this.#plans.size >= limits.plans) {
      const [oldest, plan] = this.#plans.entries().next().value as [string, Plan]
      this.#plans.delete(oldest)
      this.#destroy(plan)
    }
    const plan = this.#makePlan(asked, alignments)
    this.#plans.set(key, plan)
    return plan
  }

  #makePlan(asked: Asked, alignments: readonly number[]): Plan {
    const { precision, a, b, product } = asked
    const { m, n, k, transposeA, transposeB, batch = 1 } = product
    const { call } = this.#library
    const check = (code: number) => {
      if (code !== success) throw this.#failure(code, asked)
    }
    const type = types[precision]
    const made = { description: 0, layouts: { a: 0, b: 0, c: 0 } }
    try {
      made.description = this.#create(check, word => call.cublasLtMatmulDescCreate(word, compute32F, types.f32))
      const { transA, transB } = descriptionAttribute
      check(call.cublasLtMatmulDescSetAttribute(made.description, transA, Int32Array.of(+transposeB), 4))
      check(call.cublasLtMatmulDescSetAttribute(made.description, transB, Int32Array.of(+transposeA), 4))
      const { layouts } = made
      const layout = (name: keyof typeof layouts, type: number, rows: number, columns: number, ld: number) => {
        // Our rows are its columns.
        const one = this.#create(check, word => call.cublasLtMatrixLayoutCreate(word, type, columns, rows, ld))
        layouts[name] = one
        check(call.cublasLtMatrixLayoutSetAttribute(one, layoutAttribute.batchCount, Int32Array.of(batch), 4))
        const stride = BigInt64Array.of(BigInt(rows * ld))
        check(call.cublasLtMatrixLayoutSetAttribute(one, layoutAttribute.batchStride, stride, 8))
      }
      layout('a', type, transposeA ? k : m, transposeA ? m : k, a.ld)
      layout('b', type, transposeB ? n : k, transposeB ? k : n, b.ld)
      layout('c', types.f32, m, n, n)
      const { results, algorithms } = this.#ask(check, made, alignments)
      const choice = algorithms.length === 0 ? own : this.#options.measured ? undefined : 0
      return { ...made, results, algorithms, choice }
    } catch (error) {
      this.#destroy(made)
      throw error
    }
  }

  /** Asks the heuristic for algorithms. */
  #ask(check: (code: number) => void, { description, layouts }: Described, alignments: readonly number[]) {
    const { call, handle } = this.#library
    const most = this.#options.measured ? mostAlgorithms : 1
    const results = new ArrayBuffer(most * result.bytes)
    const count = new Int32Array(1)
    const preference = this.#create(check, word => call.cublasLtMatmulPreferenceCreate(word))
    try {
      const prefer = (attribute: number, value: ArrayBufferView) =>
        check(call.cublasLtMatmulPreferenceSetAttribute(preference, attribute, value, value.byteLength))
      prefer(preferenceAttribute.workspaceBytes, BigUint64Array.of(BigInt(mostWorkspaceBytes)))
      prefer(preferenceAttribute.reductionSchemes, Uint32Array.of(reductionComputeType))
      const [alignmentA, alignmentB, alignmentC] = alignments
      prefer(preferenceAttribute.alignmentA, Uint32Array.of(alignmentB))
      prefer(preferenceAttribute.alignmentB, Uint32Array.of(alignmentA))
      prefer(preferenceAttribute.alignmentC, Uint32Array.of(alignmentC))
      prefer(preferenceAttribute.alignmentD, Uint32Array.of(alignmentC))
      const { a, b, c } = layouts
      const found = new Uint8Array(results)
      const code = call.cublasLtMatmulAlgoGetHeuristic(handle, description, b, a, c, c, preference, most, found, count)
      if (code === notSupported) count[0] = 0
      else check(code)
    } finally {
      call.cublasLtMatmulPreferenceDestroy(preference)
    }
    const view = new DataView(results)
    const start = this.#driver.address(results)
    const algorithms = Array.from({ length: count[0] }, (_, i) => i * result.bytes)
      .filter(at => view.getInt32(at + result.state, true) === success)
      .map(at => ({ address: start + at, workspaceBytes: Number(view.getBigUint64(at + result.workspace, true)) }))
    return { results, algorithms }
  }

  #create(check: (code: number) => void, make: (word: BigUint64Array) => number): number {
    check(make(this.#word))
    return Number(this.#word[0])
  }

  #destroy({ description, layouts }: Described): void {
    const { call } = this.#library
    for (const layout of Object.values(layouts)) if (layout !== 0) call.cublasLtMatrixLayoutDestroy(layout)
    if (description !== 0) call.cublasLtMatmulDescDestroy(description)
  }

  #failure(code: number, { precision, product }: Asked): Error {
    const { op } = this.#memory
    const context = words(precision, product)
    // If the device is lost, its own error is more helpful.
    const bytes = new BigUint64Array(2)
    this.#driver.check(this.#driver.call.cuMemGetInfo(bytes.subarray(0, 1), bytes.subarray(1)), op, context)
    const name = this.#library.statusName(code)
    const report = this.#driver.report()
    return new MoeError({
      code: 'E_BACKEND',
      op,
      problem: `cuBLASLt ${this.version} returned ${name} (${code}) for ${context}${report === '' ? '' : `\n${report}`}`,
      fix: 'set CUBLASLT_LOG_LEVEL=5 for details or MOE_CUDA_CUBLASLT=0 to disable cuBLASLt, and please report this',
      details: { status: code, name, lost: false },
    })
  }
}

/** The largest power of two that divides the address, at most 256, which the heuristic assumes by default. */
function alignmentOf(pointer: number): number {
  let alignment = 256
  while (pointer % alignment !== 0) alignment /= 2
  return alignment
}

/** "bf16 [2,64,128] x [2,32,128]^T". */
function words(precision: WidePrecision, { m, n, k, transposeA, transposeB, batch = 1 }: Product): string {
  const lead = batch === 1 ? '' : `${batch},`
  const a = transposeA ? `[${lead}${k},${m}]^T` : `[${lead}${m},${k}]`
  const b = transposeB ? `[${lead}${n},${k}]^T` : `[${lead}${k},${n}]`
  return `${precision} ${a} x ${b}`
}
