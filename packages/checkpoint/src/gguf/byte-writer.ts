/** @file Writes numbers, strings and metadata values to a growing buffer. */

import {
  type GgufArray,
  type GgufNumberType,
  type GgufValue,
  type GgufValueType,
  isNumberType,
  numbers,
  typeIds,
} from './value.ts'

const encoder = new TextEncoder()

/** A growing little-endian buffer. */
export class ByteWriter {
  #bytes = new Uint8Array(1 << 16)
  #view = new DataView(this.#bytes.buffer)
  #used = 0

  number(type: GgufNumberType, value: number | bigint): void {
    const { bytes, put } = numbers[type]
    this.#room(bytes)
    put(this.#view, this.#used, value)
    this.#used += bytes
  }

  /** Writes text as UTF-8, preceded by its length in bytes. */
  string(text: string): void {
    this.#room(8 + 3 * text.length)
    const { written } = encoder.encodeInto(text, this.#bytes.subarray(this.#used + 8))
    this.number('u64', written)
    this.#used += written
  }

  /**
   * Writes a metadata value, preceded by its type.
   *
   * @throws {TypeError} if the type cannot represent the value
   */
  value(value: GgufValue): void {
    this.number('u32', idOf(value.type))
    this.#payload(value)
  }

  /** Pads with zeros to a multiple of `alignment`. */
  pad(alignment: number): void {
    const count = padding(this.#used, alignment)
    this.#room(count)
    this.#used += count
  }

  finish(): Uint8Array {
    return this.#bytes.subarray(0, this.#used)
  }

  #payload(given: GgufValue): void {
    const { type, value } = given
    if (type === 'array') {
      const { of } = given
      this.number('u32', idOf(of))
      this.number('u64', value.length)
      for (let i = 0; i < value.length; i++) {
        this.#payload(of === 'array' ? (value[i] as GgufArray) : ({ type: of, value: value[i] } as GgufValue))
      }
    } else if (isNumberType(type)) this.number(type, checkedNumber(type, value))
    else if (type === 'string') this.string(checked(type, value, typeof value === 'string' && value.isWellFormed()))
    else this.number('u8', checked(type, value, typeof value === 'boolean') ? 1 : 0)
  }

  #room(bytes: number): void {
    if (this.#used + bytes <= this.#bytes.length) return
    const larger = new Uint8Array(Math.max(2 * this.#bytes.length, this.#used + bytes))
    larger.set(this.#bytes)
    this.#bytes = larger
    this.#view = new DataView(larger.buffer)
  }
}

/** The number of bytes from `position` to the next multiple of `alignment`. */
export const padding = (position: number, alignment: number): number => (alignment - (position % alignment)) % alignment

function idOf(type: GgufValueType): number {
  if (!Object.hasOwn(typeIds, type)) throw new TypeError(`has the unknown type ${JSON.stringify(type)}`)
  return typeIds[type]
}

function checked<T>(type: string, value: T, right: boolean): T {
  if (!right) throw new TypeError(`is ${JSON.stringify(String(value)).slice(0, 100)}, expected ${type}`)
  return value
}

function checkedNumber(type: GgufNumberType, value: unknown): number | bigint {
  const { range } = numbers[type]
  if (typeof value === 'number' && range === undefined) return value
  const whole = typeof value === 'bigint' || Number.isSafeInteger(value) ? BigInt(value as number) : undefined
  if (whole === undefined || (range && (whole < range[0] || whole > range[1]))) {
    throw new TypeError(`is ${String(value).slice(0, 100)}, expected ${type}`)
  }
  return value as number | bigint
}
