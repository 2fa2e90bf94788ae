/** @file The byte alphabet of GPT-2: 256 printable characters, one a byte, in which tokenizer.json files spell tokens. */

/** Character code of each byte. Printable Latin-1 bytes stand for themselves, the rest follow from U+0100 in order. */
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

/** Spells bytes in the byte alphabet: `[0x20, 0x74]` becomes `Ġt`. */
export function spellBytes(bytes: Uint8Array): string {
  let text = ''
  for (let i = 0; i < bytes.length; i++) text += String.fromCharCode(charOfByte[bytes[i]])
  return text
}

/** Writes the bytes that `text` spells at `out[at]`; returns how many, or -1 when a character is not in the alphabet. */
export function unspellInto(text: string, out: Uint8Array, at: number): number {
  for (let i = 0; i < text.length; i++) {
    const code = text.charCodeAt(i)
    const byte = code < 324 ? byteOfChar[code] : -1
    if (byte < 0) return -1
    out[at + i] = byte
  }
  return text.length
}

/** The 256 bytes in the order of their characters, which is the order in which Hugging Face gives them ids. */
export function alphabetOrder(): number[] {
  return Array.from({ length: 256 }, (_, byte) => byte).sort((a, b) => charOfByte[a] - charOfByte[b])
}
