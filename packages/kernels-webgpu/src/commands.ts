/** @file The device's work, in order: kernels are recorded and submitted in batches. */
import { MoeError } from '@moe/core'
import { type GpuBuffer, type GpuDevice, type GpuEncoder, type GpuPass, mapRead, usage } from './gpu.ts'

/** A kernel: WGSL with the entry point `main`. The declarations of its buffers and of `p(i)`, word i of its parameters, are added to it. */
export interface Program {
  /** Unique: a kernel is compiled once per label. */
  readonly label: string
  /** Name and element type, in the order in which `run` is given them; a star after the name marks a buffer that is written: `'y* f32'`. */
  readonly buffers: readonly string[]
  /** Functions and constants, then `main`. */
  readonly body: string
}

/** Words of a kernel's parameters. */
const WORDS = 64
const SLOT_BYTES = WORDS * 4
/** Maximum number of kernels that are submitted together. */
const SLOTS = 256
/** Maximum number of cached bind groups: those of several training steps. */
const BIND_GROUPS = 8192

interface Compiled {
  /** Index among the compiled kernels. */
  readonly number: number
  readonly pipeline: unknown
  readonly layout: unknown
}

export class Commands {
  readonly #device: GpuDevice
  readonly #parameters: GpuBuffer
  readonly #words = new Uint32Array(WORDS * SLOTS)
  readonly #compiled = new Map<string, Compiled>()
  /** By the indices of the kernel and its buffers. Creating a bind group takes longer than the rest of a launch, and reused memory brings the same buffers again. */
  readonly #bindGroups = new Map<string, unknown>()
  readonly #numbers = new WeakMap<GpuBuffer, number>()
  #buffers = 0
  #encoder: GpuEncoder | undefined
  #pass: GpuPass | undefined
  #slots = 0
  /** Buffers that recorded but not yet submitted work reads or writes. */
  readonly #used = new Set<GpuBuffer>()
  #failure: MoeError | undefined
  #disposed = false

  constructor(device: GpuDevice) {
    this.#device = device
    this.#parameters = device.createBuffer({ size: SLOT_BYTES * SLOTS, usage: usage.uniform | usage.copyTo })
    device.addEventListener('uncapturederror', ({ error }) => {
      // Work submitted with it has not run, so nothing computed since can be trusted.
      if (error.constructor.name === 'GPUOutOfMemoryError') {
        this.#fail(
          'E_OUT_OF_MEMORY',
          `the GPU is out of memory: ${error.message}`,
          'create a new backend and use a smaller batch',
        )
      } else this.#fail('E_BACKEND', error.message, 'please report this message')
    })
    void device.lost.then(({ message }) => {
      if (this.#disposed) return
      this.#fail(
        'E_BACKEND',
        `the GPU was lost: ${message}`,
        'create a new backend and resume from the last checkpoint',
      )
    })
  }

  #fail(code: 'E_BACKEND' | 'E_OUT_OF_MEMORY', problem: string, fix: string): void {
    this.#failure ??= new MoeError({ code, op: 'kernels-webgpu', problem, fix })
  }

  /** Throws the error that the device has reported, if any. */
  check(): void {
    if (this.#failure) throw this.#failure
  }

  /**
   * Records a kernel. `groups` are the numbers of workgroups; if there is only one number and it exceeds the device's limit, the rest continues along y.
   * @throws MoeError E_UNSUPPORTED if the device does not support so many
   */
  run(program: Program, buffers: readonly GpuBuffer[], parameters: readonly number[], groups: readonly number[]): void {
    const most = this.#device.limits.maxComputeWorkgroupsPerDimension
    const [x, y = 1, z = 1] = groups.length === 1 && groups[0] > most ? [most, Math.ceil(groups[0] / most)] : groups
    if (Math.max(x, y, z) > most) throw tooManyGroups(program.label, groups, most)
    if (this.#slots === SLOTS) this.submit()
    const compiled = this.#compile(program)
    const slot = this.#slots++
    this.#words.set(parameters, slot * WORDS)
    const pass = this.#open()
    pass.setPipeline(compiled.pipeline)
    pass.setBindGroup(0, this.#bindGroup(compiled, buffers), [slot * SLOT_BYTES])
    pass.dispatchWorkgroups(x, y, z)
    for (const buffer of buffers) this.#used.add(buffer)
  }

  #bindGroup({ number, layout }: Compiled, buffers: readonly GpuBuffer[]): unknown {
    let key = `${number}`
    for (const buffer of buffers) key += ` ${this.numberOf(buffer)}`
    const known = this.#bindGroups.get(key)
    if (known !== undefined) return known
    const entries = [
      { binding: 0, resource: { buffer: this.#parameters, offset: 0, size: SLOT_BYTES } },
      ...buffers.map((buffer, i) => ({ binding: i + 1, resource: { buffer } })),
    ]
    const made = this.#device.createBindGroup({ layout, entries })
    // Bind groups of destroyed buffers are never used again, but still cached.
    if (this.#bindGroups.size === BIND_GROUPS) this.#bindGroups.clear()
    this.#bindGroups.set(key, made)
    return made
  }

  /** Index of a buffer, in the order of first use. */
  numberOf(buffer: GpuBuffer): number {
    const known = this.#numbers.get(buffer)
    if (known !== undefined) return known
    this.#numbers.set(buffer, this.#buffers)
    return this.#buffers++
  }

  copy(from: GpuBuffer, to: GpuBuffer, bytes: number): void {
    if (bytes === 0) return
    this.#between().copyBufferToBuffer(from, 0, to, 0, bytes)
    this.#used.add(from).add(to)
  }

  clear(buffer: GpuBuffer, bytes: number): void {
    if (bytes === 0) return
    this.#between().clearBuffer(buffer, 0, bytes)
    this.#used.add(buffer)
  }

  upload(data: ArrayBufferView, to: GpuBuffer): void {
    if (data.byteLength === 0) return
    // The write happens before all work that is submitted later.
    if (this.#used.has(to)) this.submit()
    this.#device.queue.writeBuffer(to, 0, data)
  }

  async download(from: GpuBuffer, bytes: number): Promise<ArrayBuffer> {
    this.check()
    if (bytes === 0) return new ArrayBuffer(0)
    const staging = this.#device.createBuffer({ size: bytes, usage: usage.mapRead | usage.copyTo })
    try {
      this.copy(from, staging, bytes)
      this.submit()
      await staging.mapAsync(mapRead).catch(cause => {
        this.check()
        const problem = `reading back failed: ${cause instanceof Error ? cause.message : cause}`
        throw new MoeError({ code: 'E_BACKEND', op: 'kernels-webgpu', problem, cause })
      })
      this.check()
      return staging.getMappedRange().slice(0)
    } finally {
      staging.destroy()
    }
  }

  submit(): void {
    if (!this.#encoder) return
    if (this.#slots > 0) {
      this.#device.queue.writeBuffer(this.#parameters, 0, this.#words.subarray(0, this.#slots * WORDS))
    }
    const encoder = this.#between()
    this.#device.queue.submit([encoder.finish()])
    this.#encoder = undefined
    this.#slots = 0
    this.#used.clear()
  }

  async wait(): Promise<void> {
    this.submit()
    await this.#device.queue.onSubmittedWorkDone()
    this.check()
  }

  dispose(): void {
    this.#disposed = true
    this.#pass?.end()
    this.#pass = undefined
    this.#encoder = undefined
    this.#parameters.destroy()
    this.#device.destroy()
  }

  /** The current pass; opens one if there is none. */
  #open(): GpuPass {
    if (this.#pass) return this.#pass
    this.#encoder ??= this.#device.createCommandEncoder()
    this.#pass = this.#encoder.beginComputePass()
    return this.#pass
  }

  /** The current encoder, after ending its pass. */
  #between(): GpuEncoder {
    this.#pass?.end()
    this.#pass = undefined
    this.#encoder ??= this.#device.createCommandEncoder()
    return this.#encoder
  }

  #compile({ label, buffers, body }: Program): Compiled {
    const known = this.#compiled.get(label)
    if (known) return known
    const declared = buffers.map((text, i) => {
      const [name, element] = text.split(' ')
      const access = name.endsWith('*') ? 'read_write' : 'read'
      return `@group(0) @binding(${i + 1}) var<storage, ${access}> ${name.replace('*', '')}: array<${element}>;`
    })
    const code = `@group(0) @binding(0) var<uniform> parameters: array<vec4<u32>, ${WORDS / 4}>;
fn p(i: u32) -> u32 { return parameters[i >> 2u][i & 3u]; }
${declared.join('\n')}
${body}`
    const entries = [
      { binding: 0, visibility: 4, buffer: { type: 'uniform', hasDynamicOffset: true } },
      ...buffers.map((text, i) => ({
        binding: i + 1,
        visibility: 4,
        buffer: { type: text.includes('*') ? 'storage' : 'read-only-storage' },
      })),
    ]
    const layout = this.#device.createBindGroupLayout({ entries })
    const pipeline = this.#device.createComputePipeline({
      label,
      layout: this.#device.createPipelineLayout({ bindGroupLayouts: [layout] }),
      compute: { module: this.#device.createShaderModule({ code, label }), entryPoint: 'main' },
    })
    const compiled = { number: this.#compiled.size, pipeline, layout }
    this.#compiled.set(label, compiled)
    return compiled
  }
}

function tooManyGroups(kernel: string, groups: readonly number[], most: number): MoeError {
  return new MoeError({
    code: 'E_UNSUPPORTED',
    op: 'kernels-webgpu',
    problem: `the tensors need ${groups.join(' x ')} workgroups of ${kernel}, but this GPU allows ${most} along an axis`,
    fix: 'split them along their largest axis, and compute the parts one after another',
  })
}

const bits = new DataView(new ArrayBuffer(4))

/** An f32 as a word of parameters; WGSL reads it with `bitcast<f32>(p(i))`. */
export function word(value: number): number {
  bits.setFloat32(0, value)
  return bits.getUint32(0)
}
