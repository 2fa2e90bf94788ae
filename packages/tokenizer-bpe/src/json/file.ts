/** @file Parses a tokenizer.json, and checks it before its components are read. */
import { TokenizerError } from '../errors.ts'
import { asObject, describe, invalid, type JsonObject, unsupported } from './check.ts'

/** Parses the text of a tokenizer.json and checks its nesting. */
export function parseFile(json: string | object): JsonObject {
  let parsed: unknown = json
  try {
    // Some editors write a byte order mark.
    if (typeof json === 'string') parsed = JSON.parse(json.replace(/^\uFEFF/, ''))
  } catch (cause) {
    throw new TokenizerError({
      code: 'E_FORMAT',
      op: 'tokenizer.json',
      problem: `not JSON: ${(cause as Error).message}`,
      cause,
    })
  }
  const file = asObject(parsed, '(top level)')
  checkNesting(file)
  return file
}

const MAX_NESTING = 64

/** Limits the nesting of the components that are read recursively. */
function checkNesting({ normalizer, pre_tokenizer, post_processor, decoder }: JsonObject): void {
  let level: unknown[] = [normalizer, pre_tokenizer, post_processor, decoder]
  for (let depth = 0; level.length > 0; depth++) {
    // An object that contains itself twice doubles the number of values at every level.
    if (depth > MAX_NESTING || level.length > 1e6)
      throw invalid('(top level)', `nests deeper than ${MAX_NESTING} levels`)
    level = level.flatMap(value => (typeof value === 'object' && value !== null ? Object.values(value) : []))
  }
}

/** Whether there is a normalizer. An empty sequence does nothing. */
export function needsNormalizer(json: unknown): boolean {
  return json !== undefined && json !== null && (json as { normalizers?: unknown[] }).normalizers?.length !== 0
}

/** Throws unless the decoder is ByteLevel, the only one for byte-level tokens. */
export function checkDecoder(value: unknown): void {
  if (value === undefined || value === null) return
  const json = asObject(value, 'decoder')
  if (json.type === 'Sequence' && Array.isArray(json.decoders)) json.decoders.forEach(checkDecoder)
  else if (json.type !== 'ByteLevel')
    throw unsupported('decoder.type', describe(json.type), 'only byte-level vocabularies can be read')
}
