import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { backward, namedParameters, Random, scope, setDefaultBackend, type Tensor, tensor } from '@moe/core'
import { referenceBackend } from '@moe/core/reference'
import { auxFree, combineBalancers, expertLevel, LoadMonitor } from '@moe/router'
import { afterAll, describe, expect, test } from 'vitest'
import { countParameters, DeepSeek } from './index.ts'
import { tiny } from './test-tiny.ts'

setDefaultBackend(referenceBackend())

const folder = await mkdtemp(join(tmpdir(), 'moe-deepseek-'))
afterAll(() => rm(folder, { recursive: true }))

describe('training', () => {
  const random = new Random(3)
  const rows = (documents?: number[]) => ({
    tokens: Int32Array.from({ length: 2 * 10 }, () => random.integer(40)),
    documents: Int32Array.from(documents ?? new Array(20).fill(0)),
    rows: 2,
    length: 10,
  })
  const total = async (load: Tensor | null) => Array.from(await (load as Tensor).values()).reduce((a, b) => a + b, 0)

  test('padding has no loss, and no effect on loads and balance loss', async () => {
    const model = new DeepSeek(tiny, { seed: 1, objective: { biasSpeed: 0 } })
    // Row 1 ends after its fourth token; padding has negative documents that never repeat.
    const padded = rows(Array.from({ length: 20 }, (_, i) => (i < 14 ? 0 : -i)))
    const { loss, count, metrics } = scope(() => model.loss(padded))
    expect(count).toBe(8 + 3)
    // The MTP layer reads the token after each position.
    expect(await Promise.all(model.moeLayers.map(layer => total(layer.load)))).toEqual([(8 + 4) * 2, (8 + 3) * 2])
    await model.afterStep()
    // Tokens of the padding have no influence.
    const changed = { ...padded, tokens: padded.tokens.map((token, i) => (i < 14 ? token : 1)) }
    const other = scope(() => model.loss(changed))
    expect(await other.metrics.balance.item()).toBeCloseTo(await metrics.balance.item(), 6)
    expect(await other.loss.item()).toBeCloseTo(await loss.item(), 6)
    model.dispose()
  })

  test('a balancer replaces the balance of the objective, and the monitor receives loads and biases', async () => {
    const monitor = new LoadMonitor({ topK: 2, groups: 4 })
    const balancer = combineBalancers(auxFree({ speed: step => (step === 0 ? 0.5 : 0) }), expertLevel({ alpha: 3 }))
    const model = new DeepSeek(tiny, { seed: 1, balancer, monitor, objective: { balanceWeight: 100, mtpWeight: 0 } })
    const batch = rows()
    const { loss, nll, metrics, count } = scope(() => model.loss(batch))
    const extra = (await loss.item()) - (await nll.item()) / count
    expect(extra).toBeCloseTo((await metrics.balance.item()) * model.moeLayers.length, 4)
    // The balance loss is at least 1, times the factor of 3.
    expect(extra).toBeGreaterThan(2.5 * model.moeLayers.length)
    await model.afterStep()
    expect(model.step).toBe(1)
    const reports = monitor.report()
    expect(reports.map(({ layer }) => layer)).toEqual(model.layerLoads.map(({ name }) => name))
    expect(reports.map(({ layer }) => layer)).toContain('layers.1')
    expect(reports[0]).toMatchObject({ total: 32, bias: { min: -0.5, max: 0.5 } })
    model.dispose()
  })

  test('the step of the model is that of the balancer and the schedules', () => {
    const seen: number[] = []
    const loss = (_: unknown, step: number) => {
      seen.push(step)
      return null
    }
    const balancer = { loss }
    const model = new DeepSeek(tiny, { seed: 1, balancer })
    model.step = 7
    scope(() => model.loss(rows()))
    expect(seen).toEqual(model.moeLayers.map(() => 7))
    expect(model.settings).toMatchObject({ vocab_size: tiny.vocab_size, num_experts_per_tok: 2, mtpWeight: 0.3 })
    model.dispose()
  })

  test('mtpWeight follows its schedule, and detached modules give no gradient to the main model', async () => {
    const batch = rows()
    const parts = async (objective: object, step = 0) => {
      const model = new DeepSeek(tiny, { seed: 1, objective: { balanceWeight: 0, ...objective } })
      model.step = step
      const { loss, nll, count, metrics } = scope(() => {
        const output = model.loss(batch)
        backward(output.loss)
        return { ...output, loss: output.loss.detach() }
      })
      const weight = ((await loss.item()) - (await nll.item()) / count) / (await metrics.mtp.item())
      const gradient = await (model.lm_head.weight.grad as Tensor).values()
      const mtp = model.mtp[0].eh_proj.weight.grad !== null
      model.dispose()
      return { weight, gradient, mtp }
    }
    const schedule = (step: number) => (step < 10 ? 0.3 : 0.1)
    expect((await parts({ mtpWeight: schedule }, 9)).weight).toBeCloseTo(0.3, 4)
    expect((await parts({ mtpWeight: schedule }, 10)).weight).toBeCloseTo(0.1, 4)
    const [without, detached, joint] = [
      await parts({ mtpWeight: 0 }),
      await parts({ mtpWeight: 0.3, mtpDetached: true }),
      await parts({ mtpWeight: 0.3 }),
    ]
    expect(detached.mtp).toBe(true)
    expect(detached.gradient).toEqual(without.gradient)
    expect(joint.gradient).not.toEqual(without.gradient)
  })

  test('acceptance is computed in training on request, and in evaluation', async () => {
    const model = new DeepSeek(
      { ...tiny, num_nextn_predict_layers: 2 },
      { seed: 1, objective: { mtpAcceptance: true } },
    )
    const batch = { ...rows(), rows: 1, length: 20 }
    const { metrics } = scope(() => model.loss(batch))
    const { individual, cumulative } = model.mtpAcceptance(batch)
    for (const [k, rate] of cumulative.entries()) {
      expect(await metrics[`acceptance${k + 1}`].item()).toBe(await rate.item())
      expect(await individual[k].item()).toBeGreaterThanOrEqual(await rate.item())
    }
    // Evaluation does not count loads, which are those of the training pass.
    expect(await total(model.moeLayers[0].load)).toBe(17 * 2)
    // A head of zeros, so that all depths predict token 0.
    model.lm_head.weight.assign(tensor(new Float32Array(40 * 24), [40, 24]))
    for (const rate of model.mtpAcceptance(batch).cumulative) expect(await rate.item()).toBe(1)
    model.dispose()
  })

  test('MTP modules with separate embeddings and heads are counted, saved and used', async () => {
    const config = { ...tiny, mtp_separate_embeddings: true }
    const model = new DeepSeek(config, { seed: 1 })
    const own = namedParameters(model).reduce((sum, { parameter }) => sum + parameter.size, 0)
    const { total, mtp } = countParameters(model.config)
    expect(own).toBe(total + mtp)
    await model.save(join(folder, 'separate'))
    const reopened = await DeepSeek.fromPretrained(join(folder, 'separate'))
    const ids = async (of: DeepSeek, speculative: boolean) => {
      const generated: number[] = []
      for await (const id of of.generate([3, 7, 11], { maxTokens: 20, speculative })) generated.push(id)
      return generated
    }
    expect(await ids(reopened, true)).toEqual(await ids(model, false))
    const head = reopened.mtp[0].ownHead as Tensor
    expect(await head.values()).toEqual(await (model.mtp[0].ownHead as Tensor).values())
    expect(await head.values()).not.toEqual(await reopened.lm_head.weight.values())
    model.dispose()
    reopened.dispose()
  })
})
