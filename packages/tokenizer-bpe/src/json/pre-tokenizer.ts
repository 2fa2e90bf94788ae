/**
 * @file Creates the pre-tokenizer of a tokenizer.json: a hand-written scanner if there is one; otherwise interpreted.
 */
import { feature, loadFeatures } from '../features.ts'
import type { PreTokenizer } from '../pre-tokenizer.ts'
import { guessName, isKnown } from '../pre-tokenizers.ts'

/** @throws TokenizerError E_UNSUPPORTED for an unsupported step, or in browsers if its code is not loaded */
export function compilePreTokenizer(json: unknown): PreTokenizer {
  const name = guessName(json)
  if (name !== undefined) {
    const known = feature(name)
    if (isKnown(json, known)) return { name, scanner: known.scanner }
  }
  return feature('steps')(json)
}

/** Loads the features that `compilePreTokenizer` needs for this `pre_tokenizer`. */
export async function loadPreTokenizer(json: unknown): Promise<void> {
  const name = guessName(json)
  if (name !== undefined) await loadFeatures(name)
  if (name === undefined || !isKnown(json, feature(name))) await loadFeatures('steps')
}
