/** @file Normalizers of tokenizer.json: the four Unicode forms, and sequences of them. */
import { asArray, asObject, describe, unsupported } from './json/check.ts'

export type Normalizer = (text: string) => string

/** The normalizer that a `normalizer` of tokenizer.json describes, or undefined for none. */
export function readNormalizer(value: unknown, where = 'normalizer'): Normalizer | undefined {
  if (value === undefined || value === null) return undefined
  const json = asObject(value, where)
  switch (json.type) {
    case 'NFC':
    case 'NFD':
    case 'NFKC':
    case 'NFKD': {
      const form = json.type
      return text => text.normalize(form)
    }
    case 'Sequence': {
      const steps = asArray(json.normalizers, `${where}.normalizers`)
        .map((step, i) => readNormalizer(step, `${where}.normalizers[${i}]`))
        .filter(step => step !== undefined)
      return steps.length === 0 ? undefined : text => steps.reduce((result, step) => step(result), text)
    }
    default:
      throw unsupported(`${where}.type`, describe(json.type))
  }
}
