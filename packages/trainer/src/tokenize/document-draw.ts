/**
 * @file Random decisions about a document. They depend only on the seed and the text, so that neither order nor threads
 *   matter, and copies of a document are treated alike.
 */
import { createHash } from 'node:crypto'

/** The parts of a text for fill-in-the-middle. */
export type Cuts = readonly [prefix: string, suffix: string, middle: string]

export interface Draw {
  readonly heldOut: boolean
  /** Parts of a text for fill-in-the-middle; null for a text that stays as it is. */
  readonly cuts: Cuts | null
}

/** Fractions of documents. */
export interface DrawOptions {
  readonly validation: number
  readonly fimRate: number
  readonly seed: number
}

const untouched: Draw = { heldOut: false, cuts: null }

export function drawFor(text: string, { validation, fimRate, seed }: DrawOptions): Draw {
  if (validation === 0 && fimRate === 0) return untouched
  const bytes = createHash('sha256').update(`${seed} `).update(text).digest()
  /** Uniform random numbers in [0, 1). */
  const uniform = (i: number) => bytes.readUIntBE(6 * i, 6) / 2 ** 48
  const heldOut = uniform(0) < validation
  if (heldOut || uniform(1) >= fimRate || text.length < 3) return heldOut ? { heldOut, cuts: null } : untouched
  const [from, to] = [placeIn(text, uniform(2)), placeIn(text, uniform(3))].sort((a, b) => a - b)
  return { heldOut, cuts: [text.slice(0, from), text.slice(to), text.slice(from, to)] }
}

/** A position between two characters, never inside a surrogate pair. */
function placeIn(text: string, share: number): number {
  const at = Math.floor(share * (text.length + 1))
  return text.charCodeAt(at) >> 10 === 0xdc00 >> 10 && text.charCodeAt(at - 1) >> 10 === 0xd800 >> 10 ? at - 1 : at
}
