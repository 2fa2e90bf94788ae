/** @file Reads and writes the `model` of tokenizer.json: vocabulary and merges. */
import { BpeModel, MAX_ID } from '../model.ts'
import { asArray, asFlag, asId, asObject, asString, describe, invalid, unsupported } from './check.ts'

/** @throws TokenizerError E_FORMAT for invalid content, E_UNSUPPORTED for models other than byte-level BPE */
export function readModel(value: unknown): BpeModel {
  const model = asObject(value, 'model')
  // Files written before 2021 have no type.
  if (model.type !== undefined && model.type !== 'BPE')
    throw unsupported('model.type', describe(model.type), 'only byte-level BPE models can be read')
  if (typeof model.dropout === 'number' && model.dropout > 0) throw unsupported('model.dropout', String(model.dropout))
  if (asFlag(model.byte_fallback, 'model.byte_fallback', false))
    throw unsupported('model.byte_fallback', 'true (a SentencePiece vocabulary)')
  for (const name of ['continuing_subword_prefix', 'end_of_word_suffix']) {
    if (model[name] !== undefined && model[name] !== null && model[name] !== '')
      throw unsupported(`model.${name}`, describe(model[name]))
  }

  const vocab = asObject(model.vocab, 'model.vocab')
  const idOf = new Map<string, number>()
  const tokens: (string | undefined)[] = []
  for (const token of Object.keys(vocab)) {
    const id = vocab[token]
    if (typeof id !== 'number' || !(id >= 0 && id < MAX_ID) || !Number.isInteger(id))
      asId(id, `model.vocab[${describe(token)}]`, MAX_ID)
    idOf.set(token, id as number)
  }
  for (const [token, id] of idOf) {
    if (id >= tokens.length) {
      // Filled in order, so that the engine keeps the array dense.
      for (let unused = tokens.length; unused < id; unused++) tokens.push(undefined)
      tokens.push(token)
    } else if (tokens[id] === undefined) tokens[id] = token
    else throw invalid('model.vocab', `${describe(tokens[id])} and ${describe(token)} have the same id ${id}`, { id })
  }

  const list = asArray(model.merges, 'model.merges')
  const merges = new Int32Array(list.length * 3)
  for (let rank = 0; rank < list.length; rank++) {
    const item = list[rank]
    let left: string
    let right: string
    if (typeof item === 'string') {
      const space = item.indexOf(' ')
      if (space < 0 || item.indexOf(' ', space + 1) >= 0) {
        throw invalid(`model.merges[${rank}]`, `expected two tokens with one space between, got ${describe(item)}`)
      }
      left = item.slice(0, space)
      right = item.slice(space + 1)
    } else {
      const pair = asArray(item, `model.merges[${rank}]`)
      if (pair.length !== 2) throw invalid(`model.merges[${rank}]`, `expected two tokens, got ${pair.length}`)
      left = asString(pair[0], `model.merges[${rank}][0]`)
      right = asString(pair[1], `model.merges[${rank}][1]`)
    }
    const leftId = idOf.get(left)
    const rightId = idOf.get(right)
    const productId = idOf.get(left + right)
    if (leftId === undefined || rightId === undefined || productId === undefined) {
      const missing = leftId === undefined ? left : rightId === undefined ? right : left + right
      throw invalid(`model.merges[${rank}]`, `${describe(missing)} is not in the vocabulary`, { rank, token: missing })
    }
    merges[rank * 3] = leftId
    merges[rank * 3 + 1] = rightId
    merges[rank * 3 + 2] = productId
  }

  let unknown = -1
  if (model.unk_token !== undefined && model.unk_token !== null) {
    const id = idOf.get(asString(model.unk_token, 'model.unk_token'))
    if (id !== undefined) unknown = id
  }
  return new BpeModel(tokens, idOf, merges, {
    unknown,
    fuseUnknown: asFlag(model.fuse_unk, 'model.fuse_unk', false),
    ignoreMerges: asFlag(model.ignore_merges, 'model.ignore_merges', false),
  })
}

/** Returns the `model` of tokenizer.json, with merges as pairs, as written by tokenizers 0.20 and later. */
export function writeModel(model: BpeModel): Record<string, unknown> {
  const vocab: Record<string, number> = Object.create(null)
  model.tokens.forEach((token, id) => {
    if (token !== undefined) vocab[token] = id
  })
  const merges: [string, string][] = []
  for (let i = 0; i < model.merges.length; i += 3) {
    merges.push([model.tokens[model.merges[i]]!, model.tokens[model.merges[i + 1]]!])
  }
  return {
    type: 'BPE',
    dropout: null,
    unk_token: model.options.unknown < 0 ? null : model.tokens[model.options.unknown],
    continuing_subword_prefix: null,
    end_of_word_suffix: null,
    fuse_unk: model.options.fuseUnknown,
    byte_fallback: false,
    ignore_merges: model.options.ignoreMerges,
    vocab,
    merges,
  }
}
