/** @file The part of `node:crypto` that is used, for browser builds. Browsers only offer an asynchronous SHA-256, and only on secure origins. */
import { sha256 } from '@noble/hashes/sha2.js'
import { bytesToHex, utf8ToBytes } from '@noble/hashes/utils.js'

/** Like Node's `createHash`, for the one algorithm and digest that is used. */
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
