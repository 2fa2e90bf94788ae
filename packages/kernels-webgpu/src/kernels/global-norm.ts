/** @file The norm over many tensors. */
import type { FusedAttrs, FusedKernel } from '@moe/core'
import type { Program } from '../commands.ts'
import { bufferOf, countOf, type DeviceOps } from '../device-ops.ts'
import { repeat } from './quads.ts'
import { eachRow, TEAM } from './teams.ts'

/** Tensors that one kernel reads: every GPU can bind eight buffers. */
const AT_ONCE = 7
/** Teams per tensor. */
const SHARES = 32

/** Words: 0 rows, 1 unused, 2 offset of the first tensor's partial sums, from 3 on the sizes of tensors. */
const squares: Program = {
  label: 'globalNorm squares',
  buffers: [...Array.from({ length: AT_ONCE }, (_, n) => `x${n} f32`), 'squares* f32'],
  body: eachRow(
    '',
    `
  var own = 0.0;
  let share = i % ${SHARES}u * ${TEAM}u + thread;
  switch i / ${SHARES}u {${repeat(
    AT_ONCE,
    n => `
    ${n === AT_ONCE - 1 ? 'default' : `case ${n}u`}: { for (var k = share; k < p(${3 + n}u); k += ${SHARES * TEAM}u) { own += x${n}[k] * x${n}[k]; } }`,
  )}
  }
  let sum = team_sum(own, thread);
  if (thread == 0u) { squares[p(2u) + i] = sum; }`,
  ),
}

const root: Program = {
  label: 'globalNorm',
  buffers: ['squares f32', 'y* f32'],
  body: eachRow(
    '',
    `
  var own = 0.0;
  for (var k = thread; k < size; k += ${TEAM}u) { own += squares[k]; }
  let sum = team_sum(own, thread);
  if (thread == 0u) { y[0] = sqrt(sum); }`,
  ),
}

export const globalNorm =
  (gpu: DeviceOps): FusedKernel<FusedAttrs['globalNorm']> =>
  (tensors, { parts: inParts }, [spec]) => {
    if (tensors.length === 0 || inParts) return undefined
    const y = gpu.output('globalNorm', spec)
    const parts = gpu.between('globalNorm', tensors.length * SHARES)
    for (let at = 0; at < tensors.length; at += AT_ONCE) {
      const some = tensors.slice(at, at + AT_ONCE)
      // Unused bindings are not read, but need a buffer.
      const buffers = Array.from({ length: AT_ONCE }, (_, n) => bufferOf(some[n] ?? some[0]))
      const rows = some.length * SHARES
      gpu.launch(squares, [...buffers, parts], [rows, 0, at * SHARES, ...some.map(countOf)], [rows])
    }
    gpu.launch(root, [parts, y], [1, tensors.length * SHARES], [1])
    gpu.done(parts)
    return [y]
  }
