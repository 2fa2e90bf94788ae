/** @file Reads code points from well-formed UTF-8. */

/** Returns the number of bytes of the character that starts with this byte. */
export function widthOf(lead: number): number {
  return lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4
}

/** Returns the code point of the character that starts at `at`. Does not read beyond the character. */
export function codePointAt(bytes: Uint8Array, at: number): number {
  const lead = bytes[at]
  if (lead < 0x80) return lead
  if (lead < 0xe0) return ((lead & 0x1f) << 6) | (bytes[at + 1] & 0x3f)
  if (lead < 0xf0) return ((lead & 0x0f) << 12) | ((bytes[at + 1] & 0x3f) << 6) | (bytes[at + 2] & 0x3f)
  return ((lead & 0x07) << 18) | ((bytes[at + 1] & 0x3f) << 12) | ((bytes[at + 2] & 0x3f) << 6) | (bytes[at + 3] & 0x3f)
}

/** Returns the start of the character that ends before `at`. */
export function previous(bytes: Uint8Array, at: number): number {
  let start = at - 1
  while ((bytes[start] & 0xc0) === 0x80) start--
  return start
}
