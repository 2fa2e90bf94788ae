/** @file What kernels are written with: outputs, inputs, and launches. */
import { type DType, type Handle, MoeError, sizeOf, type TensorSpec, type Value } from '@moe/core'
import type { Commands, Program } from './commands.ts'
import type { Buffer, Memory } from './memory.ts'

/** Workgroup size of kernels with one thread per element. */
export const THREADS = 64

/** Supported dtypes. */
export const supported: ReadonlySet<DType> = new Set(['f32', 'bf16', 'f8e4m3', 'i32', 'u8'])

/** The device as kernels see it. */
export class DeviceOps {
  readonly memory: Memory
  readonly #commands: Commands

  constructor(memory: Memory, commands: Commands) {
    this.memory = memory
    this.#commands = commands
  }

  /** A new buffer with undefined contents. */
  output(op: string, { shape, dtype }: TensorSpec): Buffer {
    if (!supported.has(dtype)) {
      throw new MoeError({
        code: 'E_UNSUPPORTED',
        op,
        problem: `${dtype} is not supported on WebGPU`,
        fix: 'use f32 or bf16',
        details: { dtype },
      })
    }
    return this.memory.allocate(op, shape, dtype)
  }

  /** A buffer with the contents of `x` for an output that replaces it: the value's own buffer if nobody else owns it, otherwise a copy. */
  donated(op: string, x: Value): Buffer {
    const buffer = bufferOf(x)
    return buffer.refs === 1 ? this.memory.share(buffer) : this.copied(op, x)
  }

  copied(op: string, x: Value): Buffer {
    const y = this.output(op, x)
    this.#commands.copy(bufferOf(x).gpu, y.gpu, y.bytes)
    return y
  }

  zeros(op: string, spec: TensorSpec): Buffer {
    const y = this.output(op, spec)
    this.#commands.clear(y.gpu, y.bytes)
    return y
  }

  /** Temporary memory between the kernels of one op, in 32-bit elements; release it with `done`. */
  between(op: string, elements: number): Buffer {
    return this.memory.allocate(op, [elements], 'i32')
  }

  done(...buffers: readonly Buffer[]): void {
    for (const buffer of buffers) this.memory.release(buffer)
  }

  /** Launches one thread for each of `count` elements. Word 0 of the parameters is `count`; the body is wrapped in `eachElement`. */
  each(program: Program, buffers: readonly Buffer[], count: number, parameters: readonly number[] = []): void {
    if (count === 0) return
    this.launch(program, buffers, [count, ...parameters], [Math.ceil(count / THREADS)])
  }

  launch(program: Program, buffers: readonly Buffer[], parameters: readonly number[], groups: readonly number[]): void {
    if (groups.some(size => size === 0)) return
    if (parameters.length > 64) throw tooManyAxes(program.label)
    this.#commands.run(
      program,
      buffers.map(({ gpu }) => gpu),
      parameters,
      groups,
    )
  }
}

function tooManyAxes(op: string): MoeError {
  const problem = 'its operands are broadcast or permuted along too many axes'
  return new MoeError({ code: 'E_UNSUPPORTED', op, problem, fix: 'reshape them to fewer axes first' })
}

export const bufferOf = (value: Value): Buffer => value.handle as Handle as Buffer
export const countOf = ({ shape }: TensorSpec): number => sizeOf(shape)

/** WGSL element type of a buffer of this dtype. */
export const elementOf = (dtype: string): string => (dtype === 'f32' ? 'f32' : 'i32')

/** WGSL of a kernel with one thread for each of p(0) elements; the body uses the element's index `i`. */
export const eachElement = (body: string): string => `
@compute @workgroup_size(${THREADS})
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
  let i = (group.y * groups.x + group.x) * ${THREADS}u + thread;
  if (i >= p(0u)) { return; }
${body}
}`

/** WGSL: `fn place(i, sizes, strides) -> u32`, the offset of element i of a loop nest. `sizes` and `strides` are indices of the first of p(1) parameter words each, outermost axis first. */
export const placeInNest = `
fn place(i: u32, sizes: u32, strides: u32) -> u32 {
  var rest = i;
  var at = 0u;
  for (var axis = p(1u); axis > 0u; axis--) {
    let size = p(sizes + axis - 1u);
    at += (rest % size) * p(strides + axis - 1u);
    rest /= size;
  }
  return at;
}`
