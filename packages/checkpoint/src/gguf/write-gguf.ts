/**
 * @file Writes GGUF (version 3, little-endian), the file format of llama.cpp, Ollama and LM Studio.
 *
 * A file consists of a header (magic, version, counts), metadata, one record per tensor, and the data of the tensors, each aligned to
 * 32 bytes or to `general.alignment` of the metadata (ggml-org/ggml docs/gguf.md).
 */

import { checkOptions, MoeError } from '@moe/core'
import { type Append, writeAtomically } from '../atomic-file.ts'
import { checkpointError, shown } from '../checkpoint-error.ts'
import { pathOf } from '../path-of.ts'
import { encodeGguf } from './blocks.ts'
import { ByteWriter, padding } from './byte-writer.ts'
import { type GgufEncoding, layoutOf, tensorBytes } from './tensor-type.ts'
import type { GgufValue } from './value.ts'

/** The first four bytes of a file, as a little-endian number. */
export const MAGIC = 0x46554747
export const VERSION = 3
const DEFAULT_ALIGNMENT = 32
/** ggml's `GGML_MAX_NAME` without the terminating zero, and `GGML_MAX_DIMS`. */
export const MAX_NAME_BYTES = 63
export const MAX_DIMENSIONS = 4

/** A tensor to write, given as f32 and encoded when written. */
export interface GgufTensor {
  /** 1 to 63 bytes of UTF-8, the maximum that ggml reads. */
  readonly name: string
  /** Encoding of the elements in the file. */
  readonly type: GgufEncoding
  /** Row-major, 1 to 4 positive sizes. The file stores them in reverse order. */
  readonly shape: readonly number[]
  /**
   * The elements, row-major, or a function that is called once, when the tensor is written. The function may return an async iterable
   * of parts that consist of whole rows, so that the tensor need not be in memory completely.
   */
  readonly values: Float32Array | (() => Float32Array | Promise<Float32Array> | AsyncIterable<Float32Array>)
}

/** The contents of a GGUF file. */
export interface GgufContents {
  /** Values by key, for example `general.architecture`, with their types. `general.alignment` aligns the data; default 32 bytes. */
  readonly metadata: Readonly<Record<string, GgufValue>>
  /** Tensors in the order in which they are written. */
  readonly tensors: readonly GgufTensor[]
}

/** The progress of {@link writeGguf}. */
export interface GgufProgress {
  /** Name of the tensor that is being written. */
  readonly tensor: string
  /** Bytes of tensor data written so far. */
  readonly bytes: number
  /** Bytes of tensor data in total, encoded. */
  readonly totalBytes: number
}

/** Options of {@link writeGguf}. */
export interface WriteGgufOptions {
  /** Cancels writing. An existing file stays unchanged. */
  readonly signal?: AbortSignal | undefined
  /** Called after each part of a tensor. */
  readonly onProgress?: ((progress: GgufProgress) => void) | undefined
}

/**
 * Writes a GGUF file. All names, shapes and metadata are validated before the first byte is written. The file appears complete or not at
 * all. Memory use: the header, and one part of one tensor.
 *
 * @returns the size of the file in bytes
 * @throws {MoeError} `E_CHECKPOINT` for invalid contents and if the file system fails (an existing file then stays unchanged),
 *   `E_ABORTED` when cancelled; errors of a `values` function are passed on
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
  const alignment = alignmentOf(path, contents.metadata['general.alignment'])
  const header = encodeHeader(path, contents, sizes, alignment)
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
      const rest = padding(sizes[i], alignment)
      if (rest > 0) await append(new Uint8Array(rest))
      fileBytes += sizes[i] + rest
    }
  })
  return fileBytes
}

const aborted = (path: string, { reason }: AbortSignal) =>
  new MoeError({ code: 'E_ABORTED', op: path, problem: 'writing was cancelled', cause: reason })

const refusal = (path: string, tensor: GgufTensor, problem: string, fix?: string) =>
  checkpointError(path, `tensor ${JSON.stringify(tensor.name)} ${problem}`, fix, { key: tensor.name })

function checkedSize(path: string, tensor: GgufTensor): number {
  const { name, type, shape } = tensor
  if (typeof name !== 'string' || name === '' || new TextEncoder().encode(name).length > MAX_NAME_BYTES) {
    throw refusal(path, tensor, 'has an invalid name', `use 1 to ${MAX_NAME_BYTES} bytes`)
  }
  if (!['f32', 'f16', 'bf16', 'q8_0', 'q4_0'].includes(type)) {
    throw refusal(path, tensor, `has the unsupported type ${JSON.stringify(type)}`, 'use f32, f16, bf16, q8_0 or q4_0')
  }
  const whole = shape.every(size => Number.isSafeInteger(size) && size > 0)
  if (!whole || shape.length === 0 || shape.length > MAX_DIMENSIONS) {
    const fix = `use 1 to ${MAX_DIMENSIONS} positive integers`
    throw refusal(path, tensor, `has the invalid shape [${shape.join(', ')}]`, fix)
  }
  const bytes = tensorBytes(type, shape)
  if (Number.isNaN(bytes)) {
    const fix = `rows of ${type} must be a multiple of ${layoutOf(type).block} elements; use f16 for other row lengths`
    throw refusal(path, tensor, `of type ${type} has rows of ${shape.at(-1)} elements`, fix)
  }
  return bytes
}

function refuseDuplicates(path: string, tensors: readonly GgufTensor[]): void {
  const names = new Set<string>()
  for (const tensor of tensors) {
    if (names.has(tensor.name)) throw refusal(path, tensor, 'occurs twice', 'use unique names')
    names.add(tensor.name)
  }
}

/** Returns the alignment of the data, in bytes. @throws MoeError E_CHECKPOINT if the value of `general.alignment` is invalid */
export function alignmentOf(path: string, given: GgufValue | undefined): number {
  if (given === undefined) return DEFAULT_ALIGNMENT
  const { type, value } = given
  if (type === 'u32' && Number(value) % 8 === 0 && Number(value) > 0) return Number(value)
  throw checkpointError(path, `general.alignment is ${shown(String(value))}`, 'expected a u32 that is a multiple of 8')
}

function encodeHeader(
  path: string,
  { metadata, tensors }: GgufContents,
  sizes: readonly number[],
  alignment: number,
): Uint8Array {
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
      const fix = 'pass { type, value } with a value of that type'
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
    offset += sizes[i] + padding(sizes[i], alignment)
  }
  out.pad(alignment)
  return out.finish()
}

/** Number of elements that are encoded at a time: a multiple of every block size. */
const PIECE = 1 << 20

async function writeTensor(path: string, tensor: GgufTensor, append: Append): Promise<void> {
  const { type, shape } = tensor
  const rowLength = shape.at(-1) as number
  const elements = shape.reduce((product, size) => product * size, 1)
  let given = 0
  for await (const part of partsOf(tensor)) {
    if (!(part instanceof Float32Array)) throw refusal(path, tensor, 'got values that are not a Float32Array')
    if (part.length % rowLength !== 0) {
      throw refusal(path, tensor, `got ${part.length} elements, but a row has ${rowLength}`, 'pass whole rows')
    }
    given += part.length
    if (given > elements) break
    for (let at = 0; at < part.length; at += PIECE) {
      await append(encoded(path, tensor, part.subarray(at, at + PIECE)))
    }
  }
  if (given !== elements) {
    const problem = `of type ${type} [${shape.join(', ')}] needs ${elements} elements, got ${given > elements ? 'more' : given}`
    throw refusal(path, tensor, problem, 'make shape and values match')
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
      `tensor ${JSON.stringify(tensor.name)} cannot be stored as ${tensor.type}: ${cause.message}`,
      'use bf16 or f32',
      { key: tensor.name },
      cause,
    )
  }
}
