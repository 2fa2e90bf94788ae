/** @file Hidden states for inference, with the routed experts in the model or on other ranks. */
import type { SequenceCache } from '@moe/attention-mla'
import { fromHost, keep, type Precision, type Tensor } from '@moe/core'
import { layerInPieces } from './layer-in-pieces.ts'
import { blockOf, type Network } from './network.ts'
import type { PieceRunner, RouteTokens } from './remote-experts.ts'

/** Tokens to process. */
interface HiddenInputs {
  /** 0 for the main model, k for its k-th MTP module. */
  readonly depth: number
  readonly ids: Int32Array<ArrayBuffer>
  /** Number of sequences; `ids` has as many rows. */
  readonly batch: number
  /** The hidden states `[B, n, D]` that an MTP module continues from. */
  readonly states?: Tensor | undefined
  readonly cache?: SequenceCache | undefined
}

/** Computes hidden states after the norm, `[B, n, D]`, like `Network.hiddenAt`. The caller must dispose of them. */
export async function hiddenStates(model: Network, inputs: HiddenInputs, precision: Precision): Promise<Tensor> {
  const { ids, batch } = inputs
  const upload = () => fromHost(ids, [batch, ids.length / batch], 'i32', model.backend)
  const { remoteExperts } = model
  if (remoteExperts === null)
    return keep(model.infer(() => model.hiddenAt({ ...inputs, ids: upload() }), { precision }))
  return remoteExperts.infer(precision, (pass, route) => inPieces(model, inputs, pass.run(upload), pass, route))
}

async function inPieces(
  model: Network,
  { depth, states, cache }: HiddenInputs,
  ids: Tensor,
  pass: PieceRunner,
  route: RouteTokens,
): Promise<Tensor> {
  const module = depth === 0 ? undefined : model.mtp[depth - 1]
  const layers = module ? [blockOf(module)] : model.decoder
  const first = module ? model.decoder.length + depth - 1 : 0
  let [x] = pass.piece([], () => [module?.combine(states as Tensor, ids) ?? model.model.embed_tokens.forward(ids)])
  let selected: Tensor | undefined
  /** Runs a piece of a layer, whose results include the keys that it selects. */
  const piece: PieceRunner['piece'] = (inputs, fn) => {
    const before = selected
    const made = pass.piece(inputs, (...leaves) => {
      const results = fn(...leaves)
      return selected === before ? results : [...results, selected as Tensor]
    })
    if (selected === before) return made
    selected = made.pop()
    if (before) pass.release(before)
    return made
  }
  const onSelected = (keys: Tensor) => {
    selected = keys
  }
  for (const [i, layer] of layers.entries()) {
    const options = { cache, layer: first + i, selected, onSelected }
    x = await layerInPieces(model, layer, x, { options, piece, pass, route })
  }
  cache?.advance(ids.shape[1])
  return keep(pass.piece([x], last => [module?.normalize(last) ?? model.model.norm.forward(last)])[0])
}
