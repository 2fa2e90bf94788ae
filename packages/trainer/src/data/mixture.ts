/** @file Combines token sources in fixed proportions. */
import { checkOptions, MoeError, shown } from '@moe/core'
import { namedStreams, type TokenData } from './token-data.ts'
import { isTokenStream, type TokenStream } from './token-stream.ts'

/** Options of one source in `mixture`. */
export interface MixturePart {
  /** The result of `tokenFiles`, or other token data. Its held-out part is evaluated under the source's name. */
  readonly data: Omit<TokenData, 'training'> & { readonly training: TokenStream }
  /** Its share of the rows, relative to the weights of the other sources. */
  readonly weight: number
}

/**
 * Combines several sources into `data` for `train`, for example `mixture({ web: { data: tokenFiles('web'), weight: 4 },
 * code: { data: tokenFiles('code'), weight: 1 } })`. The source of a row depends only on its position, and any stretch
 * of rows has the proportions of the weights, up to one or two rows. Each source has its own epochs.
 *
 * @throws MoeError E_CONFIG for weights that are not positive numbers, and for sources without tokens
 */
export function mixture(parts: Readonly<Record<string, MixturePart>>): TokenData {
  const given = Object.entries(parts ?? {})
  if (given.length === 0)
    throw refusal(`sources is ${shown(parts)}`, 'pass sources by name: { web: { data, weight: 1 } }')
  const validation: [string, TokenStream][] = []
  for (const [name, part] of given) {
    checkOptions(`mixture, source ${name}`, part, { data: true, weight: true })
    const { data, weight } = part
    if (!(Number.isFinite(weight) && weight > 0))
      throw refusal(`the weight of ${name} is ${shown(weight)}`, 'pass a positive number, or leave out the source')
    if (!isTokenStream(data?.training)) {
      const fix = 'pass { data: tokenFiles(folder), weight }, or { training: TokenDataset.fromTexts(texts, tokenizer) }'
      throw refusal(`the data of ${name} has no tokens to train on`, fix)
    }
    for (const [part, stream] of namedStreams(data.validation))
      validation.push([part ? `${name}.${part}` : name, stream])
  }
  const sum = given.reduce((total, [, { weight }]) => total + weight, 0)
  const sources = given.map(([name, { data, weight }]) => ({ name, data: data.training, share: weight / sum }))
  return { training: { sources }, ...(validation.length > 0 && { validation: Object.fromEntries(validation) }) }
}

const refusal = (problem: string, fix: string) => new MoeError({ code: 'E_CONFIG', op: 'mixture', problem, fix })
