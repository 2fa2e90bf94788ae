/** @file Backends on tfjs-node and tfjs-node-gpu: restores functions that new Node versions lack and checks the device. */
import { type Backend, checkOptions, MoeError } from '@moe/core'
import { loadPackage, namespaceOf } from './load-package.ts'
import { tfjsBackend } from './tfjs-backend.ts'

/** Options of `createNodeBackend`. */
export interface NodeBackendOptions {
  /** Use `@tensorflow/tfjs-node-gpu` and require a GPU. Default: false, which uses `@tensorflow/tfjs-node`. */
  readonly gpu?: boolean | undefined
  /** Imports the package if it is not installed next to this one: `() => import('@tensorflow/tfjs-node-gpu')`. */
  readonly load?: (() => Promise<unknown>) | undefined
  /**
   * Let GPUs multiply f32 as TF32 (10 bits of mantissa). Default: false, because core promises f32. Only has an effect before the first product of
   * the process.
   */
  readonly tf32?: boolean | undefined
}

interface NodeKernelBackend {
  readonly isUsingGpuDevice?: boolean
}

/**
 * Creates a backend on TensorFlow, through tfjs-node or tfjs-node-gpu, which are optional peer dependencies with a native part. Importing them makes
 * `tensorflow` the current backend of TensorFlow.js, which must not change.
 * @throws MoeError E_NO_BACKEND if the package is missing or fails to load; E_UNSUPPORTED if `gpu` is set but TensorFlow runs without a GPU,
 * which the library itself does not report
 */
export async function createNodeBackend(options: NodeBackendOptions = {}): Promise<Backend> {
  checkOptions('createNodeBackend', options, { gpu: true, load: true, tf32: true })
  const { gpu = false, tf32 = false } = options
  const name = gpu ? '@tensorflow/tfjs-node-gpu' : '@tensorflow/tfjs-node'
  await restoreNodeUtil()
  if (gpu && !tf32) process.env['NVIDIA_TF32_OVERRIDE'] ??= '0'
  // Bundlers leave this import alone: the packages have native parts.
  const load = options.load ?? (() => import(/* webpackIgnore: true */ /* @vite-ignore */ name))
  const tf = namespaceOf(await loadPackage(name, installHelp(name), load))
  const current = tf.getBackend()
  if (current !== 'tensorflow') {
    throw new MoeError({
      code: 'E_UNSUPPORTED',
      op: name,
      problem: `the current backend of TensorFlow.js is ${current}, not tensorflow`,
      fix: "call await tf.setBackend('tensorflow') of that package first",
      details: { current },
    })
  }
  const onGpu = (tf.findBackend('tensorflow') as NodeKernelBackend).isUsingGpuDevice === true
  if (gpu && !onGpu) throw silentFallback(name)
  return tfjsBackend(tf, { backend: 'tensorflow', device: onGpu ? 'TensorFlow on a GPU' : 'TensorFlow on the CPU' })
}

/** tfjs-node 4.22 calls functions of `node:util` that Node 23 removed; without them every op throws. */
async function restoreNodeUtil(): Promise<void> {
  const specifier = 'node:util'
  const { default: util } = (await import(/* webpackIgnore: true */ /* @vite-ignore */ specifier)) as {
    default: Record<string, unknown>
  }
  util['isNullOrUndefined'] ??= (value: unknown) => value === null || value === undefined
  util['isArray'] ??= Array.isArray
}

function installHelp(name: string): string {
  return (
    `run npm install ${name}, allow its install script (npm 12: npm approve-scripts ${name} && npm rebuild ${name}; ` +
    'pnpm: allowBuilds in pnpm-workspace.yaml), or build its native part against your own TensorFlow as described in docs/guides/tfjs-node-gpu.md'
  )
}

function silentFallback(name: string): MoeError {
  return new MoeError({
    code: 'E_UNSUPPORTED',
    op: name,
    problem: 'TensorFlow found no GPU and fell back to the CPU',
    fix:
      'check the messages that it printed at startup (TF_CPP_MIN_LOG_LEVEL=0), CUDA_VISIBLE_DEVICES, nvidia-smi (driver 450 or later), and that the loader finds ' +
      'CUDA 11.2 and cuDNN 8.1 (LD_LIBRARY_PATH); pass { gpu: false } to use the CPU on purpose',
    details: { CUDA_VISIBLE_DEVICES: process.env['CUDA_VISIBLE_DEVICES'] ?? null },
  })
}
