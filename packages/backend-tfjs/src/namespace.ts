/**
 * @file Structural types for the part of a TensorFlow.js namespace that this package uses. `@tensorflow/tfjs-core`, `@tensorflow/tfjs`,
 * `@tensorflow/tfjs-node` and `@tensorflow/tfjs-node-gpu` are all assignable, whichever copy of the types they use.
 */

/** dtypes of TensorFlow.js that this package uses. */
export type TfDType = 'float32' | 'int32' | 'bool'

/** A reference to a buffer of a TensorFlow.js backend. */
export interface TfTensorInfo {
  /** Identifies the buffer. */
  dataId: object
  /** Sizes of the axes. */
  shape: number[]
  /** `float32`, `int32`, `bool`, or another dtype of TensorFlow.js. */
  dtype: string
}

/** A tensor that is tracked by TensorFlow.js' engine. */
export interface TfTensor extends TfTensorInfo {
  /** Whether it survives the engine's scopes (`tf.tidy`). */
  kept: boolean
  /** Releases the engine's reference. */
  dispose(): void
}

/** The members that every TensorFlow.js backend has. Others depend on the backend; see `host/memory.ts` and `node-backend.ts`. */
export interface TfKernelBackend {
  /** Takes ownership of `values`, with one reference. */
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

/** A TensorFlow.js namespace, such as `import * as tf from '@tensorflow/tfjs-core'`. */
export interface TfNamespace {
  /** Name of the current backend; empty if there is none. */
  getBackend(): string
  /** A registered and initialized backend, or null. */
  // biome-ignore lint/suspicious/noExplicitAny: the classes of different copies of tfjs-core are not assignable to each other
  findBackend(name: string): any
  /** A kernel of a backend, or undefined. */
  // biome-ignore lint/suspicious/noExplicitAny: as above
  getKernel(kernelName: string, backendName: string): any
  /** The engine, which tracks tensors. */
  // biome-ignore lint/suspicious/noExplicitAny: as above
  engine(): any
}
