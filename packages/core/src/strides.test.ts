import fc from 'fast-check'
import { expect, test } from 'vitest'
import { type Shape, sizeOf, stridesOf } from './shape.ts'
import { broadcastNest } from './strides.ts'

/** A shape, and operands that broadcast to it: the first has the shape itself; of the others, some axes are 1 and leading ones may be missing. */
const broadcasts = fc
  .array(fc.integer({ min: 0, max: 3 }), { maxLength: 4 })
  .chain(out =>
    fc.tuple(
      fc.constant(out),
      fc.array(
        fc
          .tuple(fc.nat(out.length), fc.array(fc.boolean(), { minLength: out.length, maxLength: out.length }))
          .map(([missing, kept]) => out.map((size, axis) => (kept[axis] ? size : 1)).slice(missing)),
        { minLength: 1, maxLength: 3 },
      ),
    ),
  )
  .map(([out, operands]) => [out, [out, ...operands]] as const)

/** The position in an operand of each element of the output. */
function positions(out: Shape, operand: Shape): number[] {
  const [strides, own] = [stridesOf(out), stridesOf(operand)]
  const missing = out.length - operand.length
  return Array.from({ length: sizeOf(out) }, (_, flat) =>
    operand.reduce((at, size, axis) => {
      const index = Math.floor(flat / strides[missing + axis]) % out[missing + axis]
      return at + (size === 1 ? 0 : index * own[axis])
    }, 0),
  )
}

test('the loops of a nest visit the elements of broadcast operands in row-major order, and cannot be merged', () => {
  fc.assert(
    fc.property(broadcasts, ([out, all]) => {
      for (const operands of [all, all.slice(0, 2), all.slice(0, 2).reverse(), all.slice(1, 3)]) {
        const [rank, ...rest] = broadcastNest(out, ...operands)
        const sizes = rest.splice(0, rank)
        const nests = operands.map(() => rest.splice(0, rank))
        expect(rest).toEqual([])
        expect(rank).toBeGreaterThan(0)
        expect(sizeOf(sizes)).toBe(sizeOf(out))
        for (const [k, strides] of nests.entries()) {
          let visited = [0]
          for (const [axis, size] of sizes.entries()) {
            visited = visited.flatMap(at => Array.from({ length: size }, (_, i) => at + i * strides[axis]))
          }
          expect(visited).toEqual(positions(out, operands[k]))
        }
        // The fast path for two operands may keep an axis of size 1.
        if (sizeOf(out) === 0 || operands.length === 2) continue
        const isSeparate = (axis: number) =>
          nests.some(strides => strides[axis] !== strides[axis + 1] * sizes[axis + 1])
        for (let axis = 0; axis + 1 < rank; axis++) expect(isSeparate(axis)).toBe(true)
        if (rank > 1) expect(sizes).not.toContain(1)
      }
    }),
    { seed: 9 },
  )
})
