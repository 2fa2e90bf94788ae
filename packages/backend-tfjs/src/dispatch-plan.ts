/** @file Stable sort of slots by expert, on the host. */

export interface Plan {
  readonly order: Int32Array
  readonly positions: Int32Array
  readonly offsets: Int32Array
  readonly counts: Int32Array
}

/** Counting sort: slots (token * topK + choice) by expert, then by slot. */
export function planSlots(indices: ArrayLike<number>, experts: number): Plan {
  const slots = indices.length
  const counts = new Int32Array(experts)
  for (let s = 0; s < slots; s++) counts[indices[s]]++
  const offsets = new Int32Array(experts + 1)
  for (let e = 0; e < experts; e++) offsets[e + 1] = offsets[e] + counts[e]
  const next = offsets.slice()
  const order = new Int32Array(slots)
  const positions = new Int32Array(slots)
  for (let s = 0; s < slots; s++) {
    const at = next[indices[s]]++
    order[at] = s
    positions[s] = at
  }
  return { order, positions, offsets, counts }
}
