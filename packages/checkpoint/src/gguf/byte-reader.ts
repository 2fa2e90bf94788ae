/** @file Reads numbers, strings and metadata values from the header of an untrusted file. */

import { type GgufArray, type GgufNumberType, type GgufValue, isNumberType, numbers, valueTypeOfId } from './value.ts'

/** Thrown when the available bytes end before the header does. */
export class NeedsMoreBytes extends Error {}

const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** Maximum nesting depth of arrays. */
const MAX_DEPTH = 8

/** Minimum size of an element in bytes, to check a count before allocating memory for it. */
const fewestBytes = { string: 8, array: 12, bool: 1 } as const

/**
 * Reads the first bytes of a file.
 *
 * @throws {NeedsMoreBytes} if the available bytes end; `RangeError` if the file is too short for what it claims; `TypeError` for
 *   anything that the format does not allow
 */
export class ByteReader {
  /** Position of the next byte. */
  at = 0
  readonly #bytes: Uint8Array
  readonly #view: DataView
  readonly #fileBytes: number

  constructor(bytes: Uint8Array, fileBytes: number) {
    this.#bytes = bytes
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
    this.#fileBytes = fileBytes
  }

  number(type: GgufNumberType): number | bigint {
    const { bytes, get } = numbers[type]
    return get(this.#view, this.#take(bytes))
  }

  u32(): number {
    return this.number('u32') as number
  }

  /** Reads a 64-bit count of items of at least `each` bytes, and checks that the rest of the file can contain them. */
  count(what: string, each: number): number {
    const count = this.number('u64') as bigint
    if (count * BigInt(each) > BigInt(this.#fileBytes - this.at)) {
      throw new RangeError(`claims ${count} ${what}, more than fit in the ${this.#fileBytes} bytes of the file`)
    }
    return Number(count)
  }

  string(): string {
    const length = this.count('bytes of text', 1)
    const start = this.#take(length)
    try {
      return decoder.decode(this.#bytes.subarray(start, start + length))
    } catch {
      throw new TypeError(`has text that is not valid UTF-8 at byte ${start}`)
    }
  }

  /** Reads a metadata value, preceded by its type. */
  value(): GgufValue {
    return this.#payload(this.#type(), MAX_DEPTH)
  }

  #type(): GgufValue['type'] {
    const id = this.u32()
    const type = valueTypeOfId(id)
    if (type === undefined) throw new TypeError(`has a value of the unknown type ${id} at byte ${this.at - 4}`)
    return type
  }

  #payload(type: GgufValue['type'], depth: number): GgufValue {
    if (isNumberType(type)) return { type, value: this.number(type) }
    if (type === 'string') return { type, value: this.string() }
    if (type === 'bool') return { type, value: this.#boolean() }
    if (depth === 0) throw new TypeError(`has arrays nested deeper than ${MAX_DEPTH}`)
    const of = this.#type()
    const length = this.count(`elements of ${of}`, isNumberType(of) ? numbers[of].bytes : fewestBytes[of])
    const value: unknown[] = []
    for (let i = 0; i < length; i++) {
      const element = this.#payload(of, depth - 1)
      value.push(of === 'array' ? element : element.value)
    }
    return { type, of, value } as GgufArray
  }

  #boolean(): boolean {
    const byte = this.number('u8')
    if (byte !== 0 && byte !== 1) throw new TypeError(`has the invalid boolean ${byte} at byte ${this.at - 1}`)
    return byte === 1
  }

  /** Advances by `bytes` and returns the position before. */
  #take(bytes: number): number {
    const start = this.at
    if (start + bytes > this.#fileBytes) throw new RangeError(`is cut off: the file ends at byte ${this.#fileBytes}`)
    if (start + bytes > this.#bytes.length) throw new NeedsMoreBytes()
    this.at += bytes
    return start
  }
}
