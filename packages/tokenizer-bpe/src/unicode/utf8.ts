/** @file Reading code points from UTF-8 that is known to be well formed. */

/** Bytes in the character that starts with this byte. */
export function widthOf(lead: number): number {
  return lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4
}

/** The code point that starts at `at`. Never reads past the character. */
export function codePointAt(bytes: Uint8Array, at: number): number {
  const lead = bytes[at]
  if (lead < 0x80) return lead
  if (lead < 0xe0) return ((lead & 0x1f) << 6) | (bytes[at + 1] & 0x3f)
  if (lead < 0xf0) return ((lead & 0x0f) << 12) | ((bytes[at + 1] & 0x3f) << 6) | (bytes[at + 2] & 0x3f)
  return ((lead & 0x07) << 18) | ((bytes[at + 1] & 0x3f) << 12) | ((bytes[at + 2] & 0x3f) << 6) | (bytes[at + 3] & 0x3f)
}

/** Start of the character that ends just before `at`. */
export function previous(bytes: Uint8Array, at: number): number {
  let start = at - 1
  while ((bytes[start] & 0xc0) === 0x80) start--
  return start
}
