/** @file A tokenizer.json as a whole: its text, and what is looked at before its parts are read. */
import { TokenizerError } from '../errors.ts'
import { asObject, describe, type JsonObject, unsupported, wrong } from './check.ts'

/** The parsed text of a tokenizer.json, before its parts are read. */
export function parseFile(json: string | object): JsonObject {
  let parsed: unknown = json
  try {
    // Some editors begin UTF-8 with a byte order mark.
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

/** Before anything recurses into the parts that may nest. */
function checkNesting({ normalizer, pre_tokenizer, post_processor, decoder }: JsonObject): void {
  let level: unknown[] = [normalizer, pre_tokenizer, post_processor, decoder]
  for (let depth = 0; level.length > 0; depth++) {
    // What holds itself twice doubles with every level.
    if (depth > MAX_NESTING || level.length > 1e6) throw wrong('(top level)', `nests deeper than ${MAX_NESTING} levels`)
    level = level.flatMap(value => (typeof value === 'object' && value !== null ? Object.values(value) : []))
  }
}

/** An empty sequence is as good as none. */
export function needsNormalizer(json: unknown): boolean {
  return json !== undefined && json !== null && (json as { normalizers?: unknown[] }).normalizers?.length !== 0
}

/** Byte-level tokens are decoded in one way only. */
export function checkDecoder(value: unknown): void {
  if (value === undefined || value === null) return
  const json = asObject(value, 'decoder')
  if (json.type === 'Sequence' && Array.isArray(json.decoders)) json.decoders.forEach(checkDecoder)
  else if (json.type !== 'ByteLevel')
    throw unsupported('decoder.type', describe(json.type), 'only byte-level vocabularies can be read')
}
