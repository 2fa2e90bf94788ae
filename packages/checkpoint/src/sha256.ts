/** @file SHA-256 (FIPS 180-4), synchronous wherever JavaScript runs: browsers have it behind a promise, and on safe origins alone. */

/** The first bits of the fractions of roots of the primes. */
const fractions = (count: number, root: (prime: number) => number): Int32Array => {
  const primes: number[] = []
  for (let n = 2; primes.length < count; n++) if (primes.every(prime => n % prime > 0)) primes.push(n)
  return Int32Array.from(primes, prime => (root(prime) % 1) * 2 ** 32)
}
const K = fractions(64, Math.cbrt)

const BLOCK_BYTES = 64

/** A digest of what it is updated with, in order. @internal */
export class Sha256 {
  readonly #state = fractions(8, Math.sqrt)
  readonly #schedule = new Int32Array(64)
  readonly #block = new Uint8Array(BLOCK_BYTES)
  #bytes = 0

  /** Text counts as UTF-8, an array as its bytes. */
  update(data: string | ArrayBufferView): this {
    const bytes =
      typeof data === 'string'
        ? new TextEncoder().encode(data)
        : new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
    for (let at = 0; at < bytes.length; ) {
      const used = this.#bytes % BLOCK_BYTES
      const length = Math.min(BLOCK_BYTES - used, bytes.length - at)
      for (let i = 0; i < length; i++) this.#block[used + i] = bytes[at + i]
      at += length
      this.#bytes += length
      if (used + length === BLOCK_BYTES) compress(this.#state, this.#schedule, this.#block)
    }
    return this
  }

  /** In hexadecimal digits. Nothing is to be added afterwards. */
  hex(): string {
    const bits = this.#bytes * 8
    const used = this.#bytes % BLOCK_BYTES
    const padding = new Uint8Array((used < 56 ? BLOCK_BYTES : 2 * BLOCK_BYTES) - used)
    padding[0] = 0x80
    const length = new DataView(padding.buffer, padding.length - 8)
    length.setUint32(0, Math.floor(bits / 2 ** 32))
    length.setUint32(4, bits)
    this.update(padding)
    return Array.from(this.#state, word => (word >>> 0).toString(16).padStart(8, '0')).join('')
  }
}

function compress(state: Int32Array, w: Int32Array, block: Uint8Array): void {
  for (let i = 0; i < 16; i++) {
    const at = 4 * i
    w[i] = (block[at] << 24) | (block[at + 1] << 16) | (block[at + 2] << 8) | block[at + 3]
  }
  for (let i = 16; i < 64; i++) {
    const x = w[i - 15]
    const y = w[i - 2]
    const early = ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3)
    const late = ((y >>> 17) | (y << 15)) ^ ((y >>> 19) | (y << 13)) ^ (y >>> 10)
    w[i] = w[i - 16] + early + w[i - 7] + late
  }
  let a = state[0]
  let b = state[1]
  let c = state[2]
  let d = state[3]
  let e = state[4]
  let f = state[5]
  let g = state[6]
  let h = state[7]
  for (let i = 0; i < 64; i++) {
    const ofE = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7))
    const ofA = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10))
    const first = (h + ofE + ((e & f) ^ (~e & g)) + K[i] + w[i]) | 0
    const second = (ofA + ((a & b) ^ (a & c) ^ (b & c))) | 0
    h = g
    g = f
    f = e
    e = (d + first) | 0
    d = c
    c = b
    b = a
    a = (first + second) | 0
  }
  state[0] += a
  state[1] += b
  state[2] += c
  state[3] += d
  state[4] += e
  state[5] += f
  state[6] += g
  state[7] += h
}
