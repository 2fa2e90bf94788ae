/** @file The loss of rows with weighted tokens, its gradients, and the parts that weights do not affect. */
import { backward, namedParameters, noGrad, setDefaultBackend, tensor, zeroGrad } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { assertClose, tolerances } from '@moe/core/testing'
import { beforeEach, describe, expect, test } from 'vitest'
import { DeepSeek, type Objective } from './index.ts'
import { tiny } from './test-tiny.ts'

beforeEach(() => setDefaultBackend(referenceBackend()))

/** Two texts in the first row, a shorter one and padding in the second; lookahead 2. */
const rows = {
  tokens: Int32Array.from({ length: 20 }, (_, i) => (7 * i + i * i) % 40),
  documents: Int32Array.of(0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4, 5, 5, 5, 5, 5, -1, -2, -3, -4),
  starts: Int32Array.of(0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 0, 0, 0, 0, 0, 0, 6, 7, 8, 9),
  rows: 2,
  length: 10,
}
const time = 8
const weights = Float32Array.from({ length: 20 }, (_, i) => Math.fround(Math.cos(3 * i)))

const make = (objective: Partial<Objective> = {}) =>
  new DeepSeek({ ...tiny, num_nextn_predict_layers: 1 }, { objective: { balanceWeight: 0, ...objective } })

async function gradientsOf(model: DeepSeek, weights?: Float32Array) {
  backward(model.loss({ ...rows, ...(weights && { weights }) }).loss)
  const named = namedParameters(model).flatMap(({ name, parameter: { grad } }) => (grad ? [{ name, grad }] : []))
  const values = await Promise.all(named.map(async ({ name, grad }) => [name, await grad.values()] as const))
  zeroGrad(model)
  return new Map(values)
}

describe('weights of tokens', () => {
  test('multiply the loss of the main model, and no metrics', async () => {
    const model = make({ mtpWeight: 0 })
    const plain = model.loss(rows)
    const weighted = model.loss({ ...rows, weights })
    const nlls = await plain.nlls.values()
    expect(nlls).toHaveLength(2 * time)
    let [sum, all, count] = [0, 0, 0]
    for (const [i, nll] of nlls.entries()) {
      const at = Math.floor(i / time) * rows.length + (i % time)
      const counts = rows.documents[at] === rows.documents[at + 1]
      expect(nll > 0).toBe(counts)
      count += Number(counts)
      all += nll
      sum += weights[at + 1] * nll
    }
    expect(count).toBe(plain.count)
    expect(weighted.count).toBe(plain.count)
    assertClose('loss', [await weighted.loss.item()], [sum / count], tolerances.elementwise)
    assertClose('nll', [await weighted.nll.item(), await plain.nll.item()], [all, all], tolerances.elementwise)
    expect(await weighted.nlls.values()).toEqual(nlls)
    const mtp = await weighted.metrics['mtp'].item()
    expect(mtp).toBe(await plain.metrics['mtp'].item())
    // Also in evaluation.
    expect(await model.loss(rows, { training: false }).nlls.values()).toEqual(nlls)
  })

  test('give the gradient of the weighted loss', async ({ skip }) => {
    const model = make({ mtpWeight: 0 })
    skip(namedParameters(model)[0].parameter.backend.name !== 'reference', 'finite differences need f64')
    const gradients = await gradientsOf(model, weights)
    const lossAt = () => noGrad(() => model.loss({ ...rows, weights }).loss).item()
    for (const { name, parameter } of namedParameters(model)) {
      // MTP modules and selection biases have no gradient here.
      if (!parameter.trainable || name.startsWith('model.layers.2.')) continue
      const original = await parameter.values()
      const gradient = gradients.get(name) ?? []
      const at = Array.from(gradient, Math.abs).reduce((best, x, i, all) => (x > Math.abs(all[best]) ? i : best), 0)
      const moved = async (h: number) => {
        noGrad(() =>
          parameter.assign(
            tensor(
              original.map((x, i) => (i === at ? x + h : x)),
              parameter.shape,
            ),
          ),
        )
        return lossAt()
      }
      const h = 1e-3
      const slope = ((await moved(h)) - (await moved(-h))) / (2 * h)
      await moved(0)
      assertClose(name, [gradient[at]], [slope], { relative: 1e-3, absolute: 1e-6 })
    }
  })

  test('do not apply to MTP modules, which give no gradient to the main model', async () => {
    const alone = await gradientsOf(make({ mtpWeight: 0 }), weights)
    const joint = await gradientsOf(make({ mtpWeight: 0.3 }), weights)
    const detached = await gradientsOf(make({ mtpWeight: 0.3, mtpDetached: true }))
    const modules = [...joint.keys()].filter(name => name.startsWith('model.layers.2.'))
    expect(modules.length).toBeGreaterThan(5)
    for (const [name, gradient] of joint) {
      const expected = (modules.includes(name) ? detached : alone).get(name)
      assertClose(name, gradient, expected ?? [], tolerances.gradient)
    }
    const [first] = modules
    expect(Math.max(...Array.from(joint.get(first) ?? [], Math.abs))).toBeGreaterThan(0)
  })
})
