import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { readSafetensors, type TensorSource } from '@moe/checkpoint'
import {
  adamwStep,
  backward,
  fromHost,
  full,
  globalNorm,
  namedParameters,
  ones,
  scope,
  setDefaultBackend,
  type Tensor,
  zeros,
} from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose } from '@moe/core/testing'
import { describe, test } from 'vitest'
import { DeepSeek } from './index.ts'

setDefaultBackend(referenceBackend())

const fixture = (name: string) => fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url))
const tolerance = { relative: 1e-4, absolute: 1e-4 }
const gradientTolerance = { relative: 1e-3, absolute: 1e-4 }

interface Expected {
  loss: number
  mtpWeight?: number
  adamw: { lr: number; betas: [number, number]; eps: number; weightDecay: number; clipNorm: number; losses: number[] }
}

const floats = async (file: TensorSource, key: string) => (await file.read(key)).data as Float32Array

/** Training rows of the fixture's ids. Positions with the label -100, at the end of rows, have no loss. */
async function rowsOf(file: TensorSource, lookahead: number) {
  const ids = await file.read('input_ids')
  const labels = (await file.read('labels')).data as Int32Array
  const [rows, time] = ids.shape
  const length = time + lookahead
  const tokens = new Int32Array(rows * length)
  // Each position without a label is a separate document, so that it has no target.
  const documents = Int32Array.from({ length: rows * length }, (_, i) => i + 1)
  for (let row = 0; row < rows; row++) {
    for (let t = 0; t < time; t++) {
      tokens[row * length + t] = (ids.data as Int32Array)[row * time + t]
      if (labels[row * time + t] !== -100) documents[row * length + t] = 0
    }
  }
  return { tokens, documents, rows, length }
}

for (const name of [
  'v3-base',
  'v3-no-q-lora',
  'v3-yarn',
  'v3-yarn-mscale',
  'v3-negative-bias',
  'v3-dense-tied',
  'v3-padding',
  'v3-mtp',
  'v3-mtp-2',
  'v2-group-limited',
  'v2-lite',
  'v2-yarn',
  'v2-yarn-mscale',
  'v2-no-shared',
  'v2-dense-tied',
  'v2-padding',
  'v2-eps',
  'llama-mha',
  'llama-gqa',
  'llama-tied-head-dim',
  'llama-yarn',
  'llama-padding',
  'glm-mtp',
  'glm-two-dense',
  'youtu-tied',
  'youtu-padding',
  'kimi-k25',
  'v32-mtp',
  'dsa-glm',
  'dsa-shared',
  'mistral-base',
  'mistral-padding',
]) {
  describe(`transformers: ${name}`, async () => {
    const expected = JSON.parse(await readFile(join(fixture(name), 'fixture.json'), 'utf8')) as Expected
    const open = async () => {
      const file = await readSafetensors(join(fixture(name), 'expected.safetensors'))
      const objective = { mtpWeight: expected.mtpWeight ?? 0, balanceWeight: 0, biasSpeed: 0, indexerWeight: 0 }
      const model = await DeepSeek.fromPretrained(fixture(name), { objective })
      // transformers does not train indexers.
      for (const { name: key, parameter } of namedParameters(model)) {
        if (key.includes('.indexer.')) parameter.trainable = false
      }
      return { file, model }
    }

    test('the logits are the same', async () => {
      const { file, model } = await open()
      const ids = await file.read('input_ids')
      const logits = model.infer(() => model.forward(fromHost(ids.data as Int32Array, ids.shape, 'i32')))
      const actual = await logits.values()
      const expectedLogits = await floats(file, 'logits')
      // Padded positions attend to different tokens, and their logits are not used.
      const labels = (await file.read('labels')).data as Int32Array
      const vocabulary = model.config.vocab_size
      for (let at = 0; at < labels.length; at++) {
        if (name.endsWith('padding') && labels[at] === -100) continue
        const range = [at * vocabulary, (at + 1) * vocabulary] as const
        assertClose(`position ${at}`, actual.subarray(...range), expectedLogits.subarray(...range), tolerance)
      }
      await file.close()
      model.dispose()
    })

    test('the loss, all gradients and the losses of ten AdamW steps are the same', async () => {
      const { file, model } = await open()
      const rows = await rowsOf(file, model.lookahead)
      const { lr, betas, eps, weightDecay, clipNorm, losses } = expected.adamw
      const parameters = namedParameters(model).filter(({ parameter }) => parameter.trainable)
      const moments = parameters.map(({ parameter }) => ({ m: zeros(parameter.shape), v: zeros(parameter.shape) }))
      for (let step = 1; step <= 10; step++) {
        const loss = scope(() => {
          const { loss } = model.loss(rows)
          const value = loss.detach()
          backward(loss)
          return value
        })
        assertClose(`loss of step ${step}`, [await loss.item()], [losses[step - 1]], {
          relative: step === 1 ? 1e-5 : 1e-3,
          absolute: 0,
        })
        if (step === 1) {
          for (const { name: key, parameter, slices } of parameters) {
            const gradient = await (parameter.grad as Tensor).values()
            const parts = await Promise.all((slices ?? [key]).map(slice => floats(file, `grad.${slice}`)))
            assertClose(
              `gradient of ${key}`,
              gradient,
              parts.flatMap(part => Array.from(part)),
              gradientTolerance,
            )
          }
        }
        const norm = globalNorm(parameters.map(({ parameter }) => parameter.grad as Tensor))
        const scale = full([], clipNorm).div(norm.add(1e-6)).minimum(ones([]))
        for (const [i, { parameter }] of parameters.entries()) {
          const attrs = { lr, beta1: betas[0], beta2: betas[1], eps, weightDecay, step }
          const next = adamwStep(parameter, parameter.grad as Tensor, moments[i].m, moments[i].v, scale, attrs)
          parameter.assign(next.param)
          moments[i] = next
          parameter.zeroGrad()
        }
        await model.afterStep()
      }
      await file.close()
      model.dispose()
    })
  })
}
