/** @file For tests only: temporary folders, and files put together by hand. */

import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { onTestFinished } from 'vitest'

/** Path of a file that Python's safetensors wrote (tools/reference/safetensors_files.py). */
export const fixture = (name: string): string => fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url))

/** An empty folder that is removed when the test ends. */
export async function temporaryFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'moe-checkpoint-'))
  onTestFinished(() => rm(folder, { recursive: true, force: true }))
  return folder
}

/** A safetensors file from a header as text (or any JSON value) and as many zero bytes of data as given. */
export function rawFile(header: unknown, dataBytes: number, claimedLength?: bigint): Uint8Array {
  const json = new TextEncoder().encode(typeof header === 'string' ? header : JSON.stringify(header))
  const bytes = new Uint8Array(8 + json.length + dataBytes)
  new DataView(bytes.buffer).setBigUint64(0, claimedLength ?? BigInt(json.length), true)
  bytes.set(json, 8)
  return bytes
}

/** Writes bytes into a fresh folder and returns the path. */
export async function temporaryFile(bytes: Uint8Array, name = 'model.safetensors'): Promise<string> {
  const path = join(await temporaryFolder(), name)
  await writeFile(path, bytes)
  return path
}
