/** @file Normalizers of tokenizer.json: the four Unicode normalization forms, and sequences of them. */

import { asArray, asObject, describe, unsupported } from './json/check.ts'

export type Normalizer = (text: string) => string

type Form = 'NFC' | 'NFD' | 'NFKC' | 'NFKD'

/**
 * Characters to which Unicode 10.0 to 17.0 gave a decomposition, a combining class or a role in compositions, as ranges
 * in base 36. Hugging Face tokenizers normalizes as of Unicode 9.0, where they are left unchanged and separate what is
 * around them. This does the same in every runtime.
 */
const ADDED_LATER =
  '1kt 1p3-1pb 1qi-1qr 1z2 2f0 2m3-2m4 2wq 4k5 5a7-5b1 5b4-5bf 5x2-5x6 a2n x69-x6c x7w xux 1fpl 1fqc ' +
  '1g1t-1g1x 1g1z-1g34 1g36-1g3e 1h5w-1h5z 1h7t-1h7x 1hgr-1hgs 1hiy-1hiz 1hj1-1hj3 1hl2-1hlc 1hmq-1hmt 1htc ' +
  '1id7 1if7 1if9 1ifi 1ifl 1igo 1igr 1igy 1ih1 1ih3-1ih5 1iha-1ihc 1ila 1jcp-1jcq 1jjk 1jjs 1jjx-1jjy 1jk3 ' +
  '1jog 1jqs 1jrb 1jtl 1kci 1kck-1kcl 1kev 1kqp-1kqq 1xr2-1xrd 1xrj 206f-206i 20og-20oh 2j12-2j21 2muo-2mwd ' +
  '2mxb 2n1s-2n1y 2nce 2ne4-2ne7 2nsc-2nsf 2nzi-2nzj 2o6b 2o6e 2o6m-2o6n 2o6t 2q98 2sc0-2sc9'

let addedLater: RegExp | undefined

/** Normalizes a text as of Unicode 9.0. */
export function normalizeText(text: string, form: Form): string {
  addedLater ??= new RegExp(
    `([${ADDED_LATER.replace(/\w+/g, code => `\\u{${Number.parseInt(code, 36).toString(16)}}`).replaceAll(' ', '')}]+)`,
    'u',
  )
  const parts = text.split(addedLater)
  if (parts.length === 1) return text.normalize(form)
  return parts.map((part, i) => (i % 2 === 0 ? part.normalize(form) : part)).join('')
}

/** Creates the normalizer that `normalizer` of tokenizer.json describes; undefined if there is none. */
export function readNormalizer(value: unknown, where = 'normalizer'): Normalizer | undefined {
  if (value === undefined || value === null) return undefined
  const json = asObject(value, where)
  switch (json.type) {
    case 'NFC':
    case 'NFD':
    case 'NFKC':
    case 'NFKD': {
      const form = json.type
      return text => normalizeText(text, form)
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

export const features = { normalizer: readNormalizer }
