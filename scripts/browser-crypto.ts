/** @file What is used of `node:crypto`, for builds that run in browsers: these have SHA-256 behind a promise, and on safe origins alone. */
import { sha256 } from '@noble/hashes/sha2.js'
import { bytesToHex, utf8ToBytes } from '@noble/hashes/utils.js'

/** As Node's, of the one algorithm and digest that is asked for. */
export function createHash(_: 'sha256') {
  const hash = sha256.create()
  return {
    update(data: string | ArrayBufferView) {
      hash.update(
        typeof data === 'string' ? utf8ToBytes(data) : new Uint8Array(data.buffer, data.byteOffset, data.byteLength),
      )
      return this
    },
    digest: (_: 'hex') => bytesToHex(hash.digest()),
  }
}
