/** @file For tests only: a backend on which no test may leave tensors, temporary folders, and comparison of training runs. */
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createBackend } from '@moe/kernels-cpu'
import { afterAll, afterEach, expect } from 'vitest'
import type { Trained } from './test-training.ts'

// One thread: the models are too small for more, which would only wait.
export const backend = await createBackend({ threads: 1 })
const folders: string[] = []
afterAll(async () => {
  backend.dispose()
  for (const folder of folders) await rm(folder, { recursive: true })
})
afterEach(() => expect(backend.stats().handles).toBe(0))

export async function temporaryFolder(): Promise<string> {
  folders.push(await mkdtemp(join(tmpdir(), 'moe-parallel-')))
  return folders.at(-1) as string
}

/** The largest difference of any weight, relative to the largest weight of its tensor. */
export function difference(a: Pick<Trained, 'weights'>, b: Pick<Trained, 'weights'>): number {
  const ofTensor = (name: string) => {
    const largest = Math.max(...a.weights[name].map(Math.abs))
    return Math.max(...a.weights[name].map((x, i) => Math.abs(x - b.weights[name][i]))) / Math.max(largest, 1e-9)
  }
  return Math.max(...Object.keys(a.weights).map(ofTensor))
}

/** The selection biases of all routers. */
export const biases = ({ weights }: Trained) =>
  Object.entries(weights).filter(([name]) => name.endsWith('e_score_correction_bias'))

/** The names, dtypes and shapes of the tensors in a safetensors file. */
export async function tensorsIn(path: string): Promise<Record<string, unknown>> {
  const bytes = await readFile(path)
  const header = JSON.parse(bytes.subarray(8, 8 + Number(bytes.readBigUInt64LE(0))).toString())
  return Object.fromEntries(
    Object.entries<{ dtype: string; shape: number[] }>(header).map(([name, { dtype, shape }]) => [
      name,
      [dtype, shape],
    ]),
  )
}
