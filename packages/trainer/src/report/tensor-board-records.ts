/**
 * @file Records of a TensorBoard event file: TensorFlow's framing (length, its CRC, data, its CRC;
 *   tensorflow/core/lib/io/record_writer.cc) around a protocol buffer `Event` (tensorflow/core/util/event.proto), of
 *   which only these fields are written.
 */

export interface EventParts {
  /** Seconds since 1970. */
  readonly wallTime: number
  readonly step?: number
  /** Version of the format, in the first record of a file. */
  readonly fileVersion?: string
  /** Marks that a program starts to write at this step: earlier records of this and later steps become void. */
  readonly sessionStart?: boolean
  /** Results of `scalar`, `text` and `hyperparameters`. */
  readonly values?: readonly Buffer[]
}

export function eventRecord({
  wallTime,
  step = 0,
  fileVersion,
  sessionStart = false,
  values = [],
}: EventParts): Buffer {
  return framed(
    Buffer.concat([
      double(1, wallTime),
      ...(step === 0 ? [] : [integer(2, step)]),
      ...(fileVersion === undefined ? [] : [bytes(3, fileVersion)]),
      ...(values.length === 0 ? [] : [bytes(5, ...values.map(value => bytes(1, value)))]),
      // SessionLog with status START.
      ...(sessionStart ? [bytes(7, integer(1, 1))] : []),
    ]),
  )
}

export function scalar(tag: string, value: number): Buffer {
  const number = Buffer.alloc(5)
  number[0] = key(2, 5)
  number.writeFloatLE(value, 1)
  return Buffer.concat([bytes(1, tag), number])
}

/** @param markdown content for the text tab */
export function text(tag: string, markdown: string): Buffer {
  const string = 7
  const tensor = bytes(8, integer(1, string), bytes(2), bytes(8, markdown))
  return Buffer.concat([bytes(1, tag), tensor, bytes(9, plugin('text'))])
}

/** Settings of the run, for the hyperparameter tab. */
export function hyperparameters(settings: Readonly<Record<string, unknown>>, startSeconds: number): Buffer {
  const entries = Object.entries(settings).map(([name, value]) =>
    bytes(1, bytes(1, name), bytes(2, structValue(value))),
  )
  const content = bytes(2, bytes(3, ...entries, double(5, startSeconds)))
  // An empty tensor: only the plugin's data counts.
  const float = 1
  const empty = bytes(8, integer(1, float), bytes(2, bytes(2)))
  return Buffer.concat([bytes(1, '_hparams_/session_start_info'), empty, bytes(9, plugin('hparams', content))])
}

/** `SummaryMetadata.plugin_data`. */
const plugin = (name: string, ...content: Buffer[]) => bytes(1, bytes(1, name), ...content)

/** `google.protobuf.Value`. */
function structValue(value: unknown): Buffer {
  if (typeof value === 'number') return double(2, value)
  if (typeof value === 'boolean') return integer(4, Number(value))
  return bytes(3, String(value))
}

const key = (field: number, wire: number) => (field << 3) | wire

function varint(value: number): Buffer {
  const parts: number[] = []
  for (; value >= 128; value = Math.floor(value / 128)) parts.push((value % 128) | 128)
  return Buffer.from([...parts, value])
}

const integer = (field: number, value: number) => Buffer.concat([Buffer.from([key(field, 0)]), varint(value)])

function double(field: number, value: number): Buffer {
  const whole = Buffer.alloc(9)
  whole[0] = key(field, 1)
  whole.writeDoubleLE(value, 1)
  return whole
}

/** A string, or a message of these fields. */
function bytes(field: number, ...parts: readonly (Buffer | string)[]): Buffer {
  const content = Buffer.concat(parts.map(part => Buffer.from(part as string)))
  return Buffer.concat([Buffer.from([key(field, 2)]), varint(content.length), content])
}

function framed(data: Buffer): Buffer {
  const length = Buffer.alloc(12)
  length.writeBigUInt64LE(BigInt(data.length))
  length.writeUInt32LE(maskedCrc(length.subarray(0, 8)), 8)
  const sum = Buffer.alloc(4)
  sum.writeUInt32LE(maskedCrc(data))
  return Buffer.concat([length, data, sum])
}

function maskedCrc(data: Uint8Array): number {
  const crc = crc32c(data)
  return (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0
}

const table = Uint32Array.from({ length: 256 }, (_, byte) => {
  let crc = byte
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1
  return crc
})

/** CRC-32C (Castagnoli), RFC 3720. */
export function crc32c(data: Uint8Array): number {
  let crc = 0xffffffff
  for (const byte of data) crc = (crc >>> 8) ^ table[(crc ^ byte) & 255]
  return ~crc >>> 0
}
