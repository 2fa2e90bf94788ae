/**
 * @file The part of a TensorFlow.js namespace that this package uses, written out structurally: `@tensorflow/tfjs-core`,
 * `@tensorflow/tfjs`, `@tensorflow/tfjs-node` and `@tensorflow/tfjs-node-gpu` all fit, whichever copy of the types they bring.
 */

/** Element types that this package gives to TensorFlow.js. */
export type TfDType = 'float32' | 'int32' | 'bool'

/** Names a buffer of a TensorFlow.js backend. */
export interface TfTensorInfo {
  /** Names the buffer. */
  dataId: object
  /** Sizes of the axes. */
  shape: number[]
  /** `float32`, `int32`, `bool`, or what else TensorFlow.js has. */
  dtype: string
}

/** A tensor that TensorFlow.js' engine keeps account of. */
export interface TfTensor extends TfTensorInfo {
  /** Survives the engine's scopes (`tf.tidy`). */
  kept: boolean
  /** Gives the engine's reference back. */
  dispose(): void
}

/** What every TensorFlow.js backend has. The rest depends on which one it is; see `host/memory.ts` and `node-backend.ts`. */
export interface TfKernelBackend {
  /** Takes over `values`; counts one reference. */
  write(values: Float32Array | Int32Array | Uint8Array, shape: number[], dtype: string): object
  read(dataId: object): Promise<ArrayLike<number>>
  readSync(dataId: object): ArrayLike<number>
  numDataIds(): number
}

export type TfInputs = TfTensor[] | { readonly [name: string]: TfTensor }
export type TfAttrs = { readonly [name: string]: unknown }
export type TfKernel = (params: {
  inputs: TfInputs
  attrs: TfAttrs
  backend: TfKernelBackend
}) => TfTensorInfo | TfTensorInfo[]

export interface TfEngine {
  startScope(name?: string): void
  endScope(): void
  makeTensorFromTensorInfo(info: TfTensorInfo, backend: TfKernelBackend): TfTensor
}

/** A TensorFlow.js namespace: `import * as tf from '@tensorflow/tfjs-core'` and its like. */
export interface TfNamespace {
  /** Name of the current backend; empty before there is one. */
  getBackend(): string
  /** A registered and initialized backend, or null. */
  // biome-ignore lint/suspicious/noExplicitAny: the classes of different copies of tfjs-core are not assignable to each other
  findBackend(name: string): any
  /** A kernel of a backend, or undefined. */
  // biome-ignore lint/suspicious/noExplicitAny: as above
  getKernel(kernelName: string, backendName: string): any
  /** What keeps account of tensors. */
  // biome-ignore lint/suspicious/noExplicitAny: as above
  engine(): any
}
