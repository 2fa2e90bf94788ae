/** @file Checks JSON values in logs, which may contain anything. */

export type Fields = Readonly<Record<string, unknown>>

export const isNumber = (value: unknown): value is number => typeof value === 'number'
export const isStep = (value: unknown): value is number => Number.isSafeInteger(value) && Number(value) >= 0
export const isFields = (value: unknown): value is Fields =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

/** Parses a JSON object; undefined if the text is not one. */
export function fieldsOf(text: string): Fields | undefined {
  try {
    const value: unknown = JSON.parse(text)
    return isFields(value) ? value : undefined
  } catch {
    return undefined
  }
}
