/** @file For tests: guarded backends for every instruction set, and ops run on host arrays. */
import { type HostInput, runOp as runAnyOp } from '@moe/core/testing'
import { type CpuBackend, type CpuOptions, createBackend } from './backend.ts'
import { type Isa, isas } from './load.ts'

export type { HostInput }

/** Creates a backend with guarded buffers: a write outside a buffer fails the test. */
export function testBackend(options: CpuOptions = {}): Promise<CpuBackend> {
  return createBackend({ guarded: true, ...options })
}

/** Returns the highest instruction set that this machine supports and MOE_CPU_ISA allows. It need not be the fastest, which is the default. */
export async function highestIsa(): Promise<Isa> {
  return (await createBackend(process.env['MOE_CPU_ISA'] ? {} : { isa: isas.at(-1) })).isa
}

/** Returns every instruction set that this machine supports and MOE_CPU_ISA allows, lowest first. */
export async function availableIsas(): Promise<Isa[]> {
  return isas.slice(0, isas.indexOf(await highestIsa()) + 1)
}

/** Runs an op on host arrays and checks the guards. */
export const runOp: typeof runAnyOp = (backend, op, inputs, attrs, outputs) =>
  runAnyOp(backend, op, inputs, attrs, outputs, { guards: own => (own as Partial<CpuBackend>).checkGuards?.() })
