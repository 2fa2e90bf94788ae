/**
 * @file Writes GGUF (version 3, little-endian), the file of llama.cpp, Ollama and LM Studio.
 *
 * A file is a header (magic, version, counts), metadata, one record for each tensor, and the tensors' data, each at a multiple
 * of 32 bytes (ggml-org/ggml docs/gguf.md).
 */

import { checkOptions, MoeError } from '@moe/core'
import { type Append, writeAtomically } from '../atomic-file.ts'
import { checkpointError } from '../checkpoint-error.ts'
import { pathOf } from '../path-of.ts'
import { encodeGguf } from './blocks.ts'
import { ByteWriter, padding } from './byte-writer.ts'
import { type GgufEncoding, layoutOf, tensorBytes } from './tensor-type.ts'
import type { GgufValue } from './value.ts'

/** The first four bytes of a file, as a little-endian number. */
export const MAGIC = 0x46554747
export const VERSION = 3
export const DEFAULT_ALIGNMENT = 32
/** ggml's `GGML_MAX_NAME` less the closing zero, and `GGML_MAX_DIMS`. */
export const MAX_NAME_BYTES = 63
export const MAX_DIMENSIONS = 4

/** A tensor to be written, given in f32 and encoded on the way. */
export interface GgufTensor {
  /** At most 63 bytes of UTF-8, as ggml reads no longer ones. */
  readonly name: string
  /** What the f32 elements are encoded as. */
  readonly type: GgufEncoding
  /** Row-major, 1 to 4 sizes. The file lists them the other way round, rows first. */
  readonly shape: readonly number[]
  /**
   * The elements, row-major: whole, or a function, which is called when its turn comes, once only. That may return them in parts of
   * whole rows (an async iterable), so that a tensor need not be in memory as a whole.
   */
  readonly values: Float32Array | (() => Float32Array | Promise<Float32Array> | AsyncIterable<Float32Array>)
}

/** What a GGUF file holds. */
export interface GgufContents {
  /** Keys such as `general.architecture`, each value with its type in the file. */
  readonly metadata: Readonly<Record<string, GgufValue>>
  /** Written in this order. */
  readonly tensors: readonly GgufTensor[]
}

/** How far the writing is. */
export interface GgufProgress {
  /** The tensor that is being written. */
  readonly tensor: string
  /** Bytes of tensors so far, and in all. */
  readonly bytes: number
  /** Bytes of all tensors, encoded. */
  readonly totalBytes: number
}

/** How a file is written. */
export interface WriteGgufOptions {
  /** Stops the writing; whatever stood at the path stays. */
  readonly signal?: AbortSignal
  /** Called after each part of a tensor. */
  readonly onProgress?: (progress: GgufProgress) => void
}

/**
 * Writes a GGUF file. All names, shapes and metadata are checked before the first byte is written, and the file appears complete or
 * not at all. Memory: the header, and one part of one tensor.
 *
 * @returns bytes of the file
 * @throws {MoeError} `E_CHECKPOINT` for contents that cannot be written and failures of the file system (what stood at `path` is then
 *   unchanged), `E_ABORTED` when stopped; errors of a `values` function pass through
 *
 * @example
 * ```ts
 * await writeGguf('tiny.gguf', {
 *   metadata: { 'general.architecture': { type: 'string', value: 'llama' } },
 *   tensors: [{ name: 'output_norm.weight', type: 'f32', shape: [4], values: new Float32Array(4).fill(1) }],
 * })
 * ```
 */
export async function writeGguf(
  path: string | URL,
  contents: GgufContents,
  options: WriteGgufOptions = {},
): Promise<number> {
  checkOptions('writeGguf', options, { signal: true, onProgress: true })
  return writeTo(pathOf('writeGguf', path), contents, options)
}

async function writeTo(path: string, contents: GgufContents, options: WriteGgufOptions): Promise<number> {
  const sizes = contents.tensors.map(tensor => checkedSize(path, tensor))
  refuseDuplicates(path, contents.tensors)
  const header = encodeHeader(path, contents, sizes)
  const totalBytes = sizes.reduce((sum, bytes) => sum + bytes, 0)
  let done = 0
  let fileBytes = header.length
  await writeAtomically(path, async append => {
    await append(header)
    for (const [i, tensor] of contents.tensors.entries()) {
      await writeTensor(path, tensor, async bytes => {
        if (options.signal?.aborted) throw aborted(path, options.signal)
        await append(bytes)
        done += bytes.length
        options.onProgress?.({ tensor: tensor.name, bytes: done, totalBytes })
      })
      const rest = padding(sizes[i], DEFAULT_ALIGNMENT)
      if (rest > 0) await append(new Uint8Array(rest))
      fileBytes += sizes[i] + rest
    }
  })
  return fileBytes
}

const aborted = (path: string, { reason }: AbortSignal) =>
  new MoeError({ code: 'E_ABORTED', op: path, problem: 'writing was stopped', cause: reason })

const refusal = (path: string, tensor: GgufTensor, problem: string, fix?: string) =>
  checkpointError(path, `tensor ${JSON.stringify(tensor.name)} ${problem}`, fix, { key: tensor.name })

function checkedSize(path: string, tensor: GgufTensor): number {
  const { name, type, shape } = tensor
  if (typeof name !== 'string' || name === '' || new TextEncoder().encode(name).length > MAX_NAME_BYTES) {
    throw refusal(path, tensor, `has a name that GGUF cannot hold`, `use 1 to ${MAX_NAME_BYTES} bytes`)
  }
  if (!['f32', 'f16', 'bf16', 'q8_0', 'q4_0'].includes(type)) {
    throw refusal(path, tensor, `has the type ${JSON.stringify(type)}`, 'write f32, f16, bf16, q8_0 or q4_0')
  }
  const whole = shape.every(size => Number.isSafeInteger(size) && size > 0)
  if (!whole || shape.length === 0 || shape.length > MAX_DIMENSIONS) {
    const fix = `GGUF holds 1 to ${MAX_DIMENSIONS} sizes from 1 on`
    throw refusal(path, tensor, `has the shape [${shape.join(', ')}]`, fix)
  }
  const bytes = tensorBytes(type, shape)
  if (Number.isNaN(bytes)) {
    const fix = `${type} stores ${layoutOf(type).block} elements of a row together; use f16 where rows are no multiple of that`
    throw refusal(path, tensor, `of ${type} has rows of ${shape.at(-1)} elements`, fix)
  }
  return bytes
}

function refuseDuplicates(path: string, tensors: readonly GgufTensor[]): void {
  const names = new Set<string>()
  for (const tensor of tensors) {
    if (names.has(tensor.name)) throw refusal(path, tensor, 'occurs twice', 'give every tensor its own name')
    names.add(tensor.name)
  }
}

function encodeHeader(path: string, { metadata, tensors }: GgufContents, sizes: readonly number[]): Uint8Array {
  const out = new ByteWriter()
  const entries = Object.entries(metadata)
  out.number('u32', MAGIC)
  out.number('u32', VERSION)
  out.number('u64', tensors.length)
  out.number('u64', entries.length)
  for (const [key, value] of entries) {
    out.string(key)
    try {
      out.value(value)
    } catch (cause) {
      if (!(cause instanceof TypeError)) throw cause
      const fix = 'give every value its type in the file and a value of that type'
      throw checkpointError(path, `metadata ${JSON.stringify(key)} ${cause.message}`, fix, { key }, cause)
    }
  }
  let offset = 0
  for (const [i, { name, type, shape }] of tensors.entries()) {
    out.string(name)
    out.number('u32', shape.length)
    for (const size of shape.toReversed()) out.number('u64', size)
    out.number('u32', layoutOf(type).id)
    out.number('u64', offset)
    offset += sizes[i] + padding(sizes[i], DEFAULT_ALIGNMENT)
  }
  out.pad(DEFAULT_ALIGNMENT)
  return out.finish()
}

/** Elements that are encoded at a time: a multiple of every block. */
const PIECE = 1 << 20

async function writeTensor(path: string, tensor: GgufTensor, append: Append): Promise<void> {
  const { type, shape } = tensor
  const rowLength = shape.at(-1) as number
  const elements = shape.reduce((product, size) => product * size, 1)
  let given = 0
  for await (const part of partsOf(tensor)) {
    if (!(part instanceof Float32Array)) throw refusal(path, tensor, 'was given something else than a Float32Array')
    if (part.length % rowLength !== 0) {
      throw refusal(path, tensor, `was given ${part.length} elements, but a row has ${rowLength}`, 'give whole rows')
    }
    given += part.length
    if (given > elements) break
    for (let at = 0; at < part.length; at += PIECE) {
      await append(encoded(path, tensor, part.subarray(at, at + PIECE)))
    }
  }
  if (given !== elements) {
    const problem = `of ${type} [${shape.join(', ')}] needs ${elements} elements, it was given ${given > elements ? 'more' : given}`
    throw refusal(path, tensor, problem, 'shape and values must agree')
  }
}

async function* partsOf({ values }: GgufTensor): AsyncGenerator<Float32Array> {
  const given = typeof values === 'function' ? values() : values
  if (typeof given === 'object' && Symbol.asyncIterator in given) yield* given
  else yield await given
}

function encoded(path: string, tensor: GgufTensor, values: Float32Array): Uint8Array {
  try {
    return encodeGguf(tensor.type, values)
  } catch (cause) {
    if (!(cause instanceof RangeError)) throw cause
    throw checkpointError(
      path,
      `tensor ${JSON.stringify(tensor.name)} cannot be ${tensor.type}: ${cause.message}`,
      'write it as bf16 or f32',
      { key: tensor.name },
      cause,
    )
  }
}
