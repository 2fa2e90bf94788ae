/** @file Numbers, strings and metadata values read from the start of a file that may lie. */

import { type GgufArray, type GgufNumberType, type GgufValue, isNumberType, numbers, valueTypeOfId } from './value.ts'

/** Thrown where the bytes at hand end, though the file goes on. */
export class NeedsMoreBytes extends Error {}

const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** Arrays may nest as deep as this. */
const MAX_DEPTH = 8

/** Fewest bytes of an element: what a count is checked against before anything is allocated. */
const fewestBytes = { string: 8, array: 12, bool: 1 } as const

/**
 * Reads from the first bytes of a file.
 *
 * @throws {NeedsMoreBytes} where they end; `RangeError` where the file itself is too short for what it claims, `TypeError` for
 *   what the format does not know
 */
export class ByteReader {
  /** Byte that comes next. */
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

  /** A 64-bit count of things that take at least `each` bytes, none of which can be beyond the end of the file. */
  count(what: string, each: number): number {
    const count = this.number('u64') as bigint
    if (count * BigInt(each) > BigInt(this.#fileBytes - this.at)) {
      throw new RangeError(`claims ${count} ${what}, more than the ${this.#fileBytes} bytes of the file can hold`)
    }
    return Number(count)
  }

  string(): string {
    const length = this.count('bytes of text', 1)
    const start = this.#take(length)
    try {
      return decoder.decode(this.#bytes.subarray(start, start + length))
    } catch {
      throw new TypeError(`has text that is not UTF-8 at byte ${start}`)
    }
  }

  /** A metadata value behind its type. */
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
    if (byte !== 0 && byte !== 1) throw new TypeError(`has the boolean ${byte} at byte ${this.at - 1}`)
    return byte === 1
  }

  /** Where the next bytes start. */
  #take(bytes: number): number {
    const start = this.at
    if (start + bytes > this.#fileBytes) throw new RangeError(`ends at byte ${this.#fileBytes}, within its header`)
    if (start + bytes > this.#bytes.length) throw new NeedsMoreBytes()
    this.at += bytes
    return start
  }
}
