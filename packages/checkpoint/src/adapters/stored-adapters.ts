/** @file Splits the state dict of a module into adapters and base model. */
import { type Module, type NamedAdapter, namedAdapters, namedParameters, type StateEntry, stateDict } from '@moe/core'

export interface StoredAdapters {
  readonly adapters: readonly StateEntry[]
  readonly base: readonly StateEntry[]
}

/** Splits the state dict of a module into adapters and base model. */
export function storedAdapters(module: Module): StoredAdapters {
  const matrices = new Set(namedAdapters(module).flatMap(({ adapter: { down, up } }) => [down, up]))
  const keys = new Set(
    namedParameters(module).flatMap(({ name, parameter, slices }) =>
      matrices.has(parameter) ? (slices ?? [name]) : [],
    ),
  )
  const entries = stateDict(module)
  return {
    adapters: entries.filter(({ name }) => keys.has(name)),
    base: entries.filter(({ name }) => !keys.has(name)),
  }
}

/** The path of a weight in PEFT's naming: its key without `.weight`. */
export const pathOfWeight = (key: string): string => key.replace(/(^|\.)weight$/, '')

/** The paths under which a weight is stored: one, or one for each expert. */
export const pathsOf = ({ name, slices }: Pick<NamedAdapter, 'name' | 'slices'>): string[] =>
  (slices ?? [name]).map(pathOfWeight)
