/**
 * @file A decoder layer in pieces, between which a rank can wait for others. The routed experts are computed elsewhere.
 */
import type { Tensor } from '@moe/core'
import { MoELayer } from '@moe/router'
import type { DecoderLayer, LayerOptions } from './decoder-layer.ts'
import type { Network } from './network.ts'
import type { PieceRunner, RouteTokens } from './remote-experts.ts'

/** How to run a layer in pieces. */
interface InPieces extends Pick<PieceRunner, 'piece'> {
  readonly options: LayerOptions
  readonly pass: Pick<PieceRunner, 'release'>
  readonly route: RouteTokens
}

/** Runs a layer of the model or of an MTP module on a leaf, which is not read afterwards. Resolves to a leaf. */
export async function layerInPieces(
  model: Network,
  layer: DecoderLayer,
  input: Tensor,
  { options, piece, pass, route }: InPieces,
): Promise<Tensor> {
  const { mlp } = layer
  if (!(mlp instanceof MoELayer)) {
    const [output] = piece([input], x => [layer.forward(x, options)])
    pass.release(input)
    return output
  }
  const [attended, x, weights, ...others] = piece([input], before =>
    layer.whole(before, options, (from, own) => {
      const after = layer.attend(from, own)
      const { x, weights, indices } = mlp.choose(layer.post_attention_layernorm.forward(after), own)
      return [after, x, weights, ...(mlp.shared_experts ? [mlp.shared_experts.forward(x)] : []), indices]
    }),
  )
  const indices = others.pop() as Tensor
  const routed = await route(model.moeLayers.indexOf(mlp), { x, weights, indices })
  const [output] = piece([attended, routed, ...others], (residual, ...outs) => [
    residual.add(outs.reduce((sum, out) => sum.add(out)).reshape(residual.shape)),
  ])
  pass.release(input, attended, x, weights, indices, routed, ...others)
  return output
}
