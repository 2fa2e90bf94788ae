/** @file What a module with adapters stores, in two: the adapters, and what they stand beside. */
import { type Module, type NamedAdapter, namedAdapters, namedParameters, type StateEntry, stateDict } from '@moe/core'

export interface StoredAdapters {
  readonly adapters: readonly StateEntry[]
  readonly base: readonly StateEntry[]
}

/** The entries of a state dict, parted. */
export function storedAdapters(module: Module): StoredAdapters {
  const beside = new Set(namedAdapters(module).flatMap(({ adapter: { down, up } }) => [down, up]))
  const keys = new Set(
    namedParameters(module).flatMap(({ name, parameter, slices }) => (beside.has(parameter) ? (slices ?? [name]) : [])),
  )
  const entries = stateDict(module)
  return {
    adapters: entries.filter(({ name }) => keys.has(name)),
    base: entries.filter(({ name }) => !keys.has(name)),
  }
}

/** What a weight belongs to, as PEFT calls it: its key without `.weight`. */
export const pathOfWeight = (key: string): string => key.replace(/(^|\.)weight$/, '')

/** Paths of a weight as it is stored: one, or one per expert. */
export const pathsOf = ({ name, slices }: Pick<NamedAdapter, 'name' | 'slices'>): string[] =>
  (slices ?? [name]).map(pathOfWeight)
