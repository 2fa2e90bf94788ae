/** @file `tfjsBackend`: core's Backend on any TensorFlow.js backend. */
import {
  type Backend,
  checkOptions,
  type DType,
  type FusedKernels,
  type FusedName,
  type HostArray,
  hostArray,
  MoeError,
  type PrimitiveKernels,
  type PrimitiveName,
  type Shape,
  sizeOf,
  type TensorSpec,
  type Value,
} from '@moe/core'
import { type Device, ops } from './device/ops.ts'
import { deviceFused, devicePrimitives, probeDevice } from './device/table.ts'
import { type Host, hostMemory, wasmAllocationFailed } from './host/memory.ts'
import { hostFused, hostPrimitives } from './host/table.ts'
import type { TfKernelBackend, TfNamespace, TfTensor } from './namespace.ts'
import { makeRunner, type Runner, type TfHandle, tensorOf } from './runner.ts'

/** Options of `tfjsBackend`. */
export interface TfjsBackendOptions {
  /** Name of a registered and initialized TensorFlow.js backend. Default: the current one (`tf.getBackend()`). */
  readonly backend?: string | undefined
  /** Name of the device, for display. Default: the name of the TensorFlow.js backend. */
  readonly device?: string | undefined
  /**
   * How tensors may be read while computing. Default: the first that the TensorFlow.js backend supports; others are for tests.
   * - `views` (cpu, wasm): memory is accessed in place, and loops replace kernels that are inexact, slow or missing
   * - `sync` (also tensorflow): only kernels; small integer tensors are read back
   * - `async` (webgpu, webgl): only kernels; nothing is read back
   */
  readonly reads?: 'views' | 'sync' | 'async' | undefined
}

const supported: ReadonlySet<DType> = new Set(['f32', 'i32', 'u8'])

type Compute = (inputs: readonly Value[], attrs: never, outputs: readonly TensorSpec[]) => TfTensor[] | undefined

/**
 * Creates a backend on a TensorFlow.js namespace: `tfjsBackend(tf)` after `await tf.ready()`. Works with the cpu, wasm, tensorflow (tfjs-node and
 * tfjs-node-gpu), webgpu and webgl backends. dtypes: f32, i32 and u8; TensorFlow.js has no 16- or 8-bit floats.
 * @throws MoeError E_NO_BACKEND if the namespace has no initialized backend of that name
 */
export function tfjsBackend(tf: TfNamespace, options: TfjsBackendOptions = {}): Backend {
  checkOptions('tfjsBackend', options, { backend: true, device: true, reads: true })
  const name = options.backend ?? tf.getBackend()
  const engineBackend = name ? (tf.findBackend(name) as TfKernelBackend | null) : null
  if (engineBackend === null || engineBackend === undefined) {
    throw new MoeError({
      code: 'E_NO_BACKEND',
      op: 'tfjsBackend',
      problem: `TensorFlow.js has no initialized backend${name ? ` '${name}'` : ''}`,
      fix: "import one (for example '@tensorflow/tfjs-backend-wasm') and call await tf.setBackend(name) first",
      details: { backend: name },
    })
  }
  const outOfMemory = name === 'wasm' ? wasmAllocationFailed(engineBackend) : () => false
  const runner = makeRunner(tf, name, outOfMemory)
  const reads = options.reads ?? 'views'
  const host = reads === 'views' ? hostMemory(runner) : null
  const tables = host === null ? deviceTables(runner, reads !== 'async' && synchronous.has(name)) : hostTables(host)

  function kernels(table: { readonly [op: string]: Compute }) {
    return Object.fromEntries(Object.entries(table).map(([op, compute]) => [op, kernel(runner, op, compute)]))
  }
  const primitives = kernels(tables.primitives) as unknown as PrimitiveKernels

  return {
    name: `tfjs-${name}`,
    device: options.device ?? `TensorFlow.js ${name}`,
    dtypes: supported,
    bf16Matmul: false,
    fp8Matmul: false,
    primitives: { ...primitives, reshape: reshapeKernel(runner) },
    fused: kernels(tables.fused) as FusedKernels,
    upload: (data, shape, dtype) => upload(runner, host, data, shape, dtype),
    download: async value => download(runner, value),
    free: handle => runner.free(handle),
    async sync() {
      // Work runs in order, so waiting for the last result is enough; on host memory, ops are done when their call returns.
      if (host === null) await flush(runner)
    },
    stats: runner.stats,
    dispose: runner.dispose,
  }
}

/** TensorFlow.js backends whose tensors can be read synchronously. webgl can too, but it stalls its pipeline. */
const synchronous = new Set(['cpu', 'wasm', 'tensorflow'])

function hostTables(host: Host) {
  return {
    primitives: bind(hostPrimitives, fn => (inputs, attrs, outputs) => fn(host, inputs, attrs, outputs)),
    fused: bind(hostFused, fn => (inputs, attrs, outputs) => fn(host, inputs, attrs, outputs)),
  }
}

function deviceTables(runner: Runner, syncReads: boolean) {
  const op = ops(runner, !syncReads)
  const device: Device = probeDevice(runner, op, syncReads)
  return {
    primitives: bind(devicePrimitives, fn => (inputs, attrs, outputs) => {
      // Kernels handle tensors without elements differently, and there is nothing to compute.
      if (outputs.every(({ shape }) => sizeOf(shape) === 0)) {
        return outputs.map(({ shape, dtype }) => op.fill(shape, 0, dtype === 'f32' ? 'float32' : 'int32'))
      }
      return fn(device, op, inputs, attrs, outputs)
    }),
    fused: bind(deviceFused, fn => (inputs, attrs, outputs) => {
      if (inputs.some(({ shape }) => sizeOf(shape) === 0)) return undefined
      return fn(device, op, inputs, attrs, outputs)
    }),
  }
}

function bind<Fn>(
  table: { readonly [P in PrimitiveName | FusedName]?: Fn },
  call: (fn: Fn) => Compute,
): { [op: string]: Compute } {
  return Object.fromEntries(Object.entries(table).map(([op, fn]) => [op, call(fn as Fn)]))
}

function kernel(runner: Runner, op: string, compute: Compute) {
  const wasm = runner.name === 'wasm'
  return (inputs: readonly Value[], attrs: never, outputs: readonly TensorSpec[]): TfHandle[] | undefined => {
    for (let i = 0; i < outputs.length; i++) {
      needSupported(op, outputs[i].dtype)
      if (wasm) needAddressable(op, outputs[i].shape)
    }
    let declined = false
    const handles = runner.handles(op, outputs, () => {
      const tensors = compute(inputs, attrs, outputs)
      declined = tensors === undefined
      return tensors ?? []
    })
    return declined ? undefined : handles
  }
}

function reshapeKernel(runner: Runner): PrimitiveKernels['reshape'] {
  return ([x], _, [{ shape }]) => [
    runner.share(x.handle, runner.run('Reshape', { x: tensorOf(x) }, { shape: shape.slice() })),
  ]
}

function needSupported(op: string, dtype: DType): void {
  if (supported.has(dtype)) return
  throw new MoeError({
    code: 'E_UNSUPPORTED',
    op,
    problem: `${dtype} is not supported on TensorFlow.js`,
    fix: 'use f32, or another backend (@moe/kernels-cpu, @moe/kernels-cuda) for 16- and 8-bit floats',
    details: { dtype, supported: [...supported] },
  })
}

/** The wasm allocator takes sizes modulo 2^32 and would return too little memory. */
function needAddressable(op: string, shape: Shape): void {
  const bytes = sizeOf(shape) * 4
  if (bytes < 2 ** 32) return
  throw new MoeError({
    code: 'E_OUT_OF_MEMORY',
    op,
    problem: `a tensor of shape [${shape}] needs ${bytes} bytes, but wasm is limited to 4 GB`,
    fix: 'use a smaller batch or another backend',
    details: { shape, bytes },
  })
}

function upload(runner: Runner, host: Host | null, data: HostArray, shape: Shape, dtype: DType): TfHandle {
  needSupported('upload', dtype)
  return runner.handles('upload', [{ shape, dtype }], () => {
    if (host !== null) {
      const tensor = host.output(shape, dtype === 'f32' ? 'float32' : dtype === 'i32' ? 'int32' : 'bool')
      host.view(tensor).set(data)
      return [tensor]
    }
    return [ops(runner).upload(dtype === 'f32' ? Float32Array.from(data) : Int32Array.from(data), shape)]
  })[0]
}

/** A copy, because some backends return the array that they keep. */
async function download(runner: Runner, value: Value): Promise<HostArray> {
  const out = hostArray(value.dtype, sizeOf(tensorOf(value).shape))
  out.set(await runner.read(value.handle))
  return out
}

async function flush(runner: Runner): Promise<void> {
  const marker = ops(runner).scalar(0, 'float32')
  const after = ops(runner).add(marker, marker)
  await runner.backend.read(after.dataId)
  marker.dispose()
  after.dispose()
}
