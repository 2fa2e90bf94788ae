/** @file The byte alphabet of GPT-2: one printable character per byte, in which tokenizer.json files write tokens. */

/** Character code of each byte. Printable Latin-1 bytes map to themselves, the others to U+0100 and up, in order. */
export const charOfByte: Uint16Array = new Uint16Array(256)
/** Byte of each character code below 324, or -1. */
export const byteOfChar: Int16Array = new Int16Array(324).fill(-1)

let next = 256
for (let byte = 0; byte < 256; byte++) {
  const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174
  const char = printable ? byte : next++
  charOfByte[byte] = char
  byteOfChar[char] = byte
}

/** Returns bytes as text in the byte alphabet: `[0x20, 0x74]` becomes `Ġt`. */
export function bytesToAlphabet(bytes: Uint8Array): string {
  let text = ''
  for (let i = 0; i < bytes.length; i++) text += String.fromCharCode(charOfByte[bytes[i]])
  return text
}

/**
 * Writes the bytes of a text in the byte alphabet to `out`, starting at index `at`. Returns their number, or -1 if a
 * character is not in the alphabet.
 */
export function alphabetToBytes(text: string, out: Uint8Array, at: number): number {
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i)
    const byte = code < 324 ? byteOfChar[code] : -1
    if (byte < 0) return -1
    out[at + i] = byte
  }
  return text.length
}

/** Returns the 256 bytes in the order of their characters, in which Hugging Face assigns ids. */
export function alphabetOrder(): number[] {
  return Array.from({ length: 256 }, (_, byte) => byte).sort((a, b) => charOfByte[a] - charOfByte[b])
}
