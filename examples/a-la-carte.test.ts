/** @file Runs the short examples, each in its own process as a reader would, and checks what they print. */
import { spawn } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { afterAll, expect, test } from 'vitest'

const folder = mkdtempSync(join(tmpdir(), 'moe-examples-'))
afterAll(() => rmSync(folder, { recursive: true }))

function run(name: string, ...args: string[]): Promise<{ code: number | null; output: string }> {
  return new Promise((resolve, reject) => {
    const script = fileURLToPath(new URL(name, import.meta.url))
    const child = spawn(process.execPath, [script, ...args], { cwd: folder, stdio: ['ignore', 'pipe', 'pipe'] })
    let output = ''
    const collect = (chunk: Buffer) => {
      output += chunk
    }
    child.stdout.on('data', collect)
    child.stderr.on('data', collect)
    child.on('error', reject)
    child.on('close', code => resolve({ code, output }))
  })
}

async function runSuccessfully(name: string, ...args: string[]): Promise<string> {
  const { code, output } = await run(name, ...args)
  expect(code, output).toBe(0)
  return output
}

test('mla-in-your-own-block: the cache is small, and decoding equals the full forward pass', async () => {
  const output = await runSuccessfully('mla-in-your-own-block.ts')
  // (32 + 8) * 4 bytes of latent and rope key, compared with 8 heads * (24 + 16) * 4.
  expect(output).toContain('160 bytes per token and layer; full keys and values would take 1280')
  expect(output).toContain('trained 9 of 9 parameters')
  expect(output).toMatch(/^equal$/m)
})

test('router-telemetry: MaxVio falls with the bias, and stays high without it', async () => {
  const output = await runSuccessfully('router-telemetry.ts')
  const rows = [...output.matchAll(/^ *(\d+) {3} *([\d.]+) +\d+ +\d+ +([\d.]+) /gm)].map(row =>
    row.slice(1).map(Number),
  )
  expect(rows.map(([step]) => step)).toEqual([0, 20, 40, 60, 80, 100, 120, 140, 160])
  const [, without, withBias] = rows[rows.length - 1]
  expect(withBias).toBeLessThan(0.3)
  expect(without).toBeGreaterThan(0.6)
})

test('mtp-on-a-plain-transformer: every depth learns', async () => {
  const output = await runSuccessfully('mtp-on-a-plain-transformer.ts')
  const rows = [...output.matchAll(/^ *\d+ {3}([\d.]+) {2}([\d.]+) {2}([\d.]+)$/gm)].map(row =>
    row.slice(1).map(Number),
  )
  expect(rows.length).toBe(6)
  for (const depth of [0, 1, 2]) expect(rows[5][depth]).toBeLessThan(rows[0][depth] - 1)
})

test('train-a-tokenizer: saves a tokenizer.json that reads back', async () => {
  const output = await runSuccessfully('train-a-tokenizer.ts', folder)
  expect(output).toMatch(/trained 4096 tokens/)
  expect(output).toContain('read back; all texts round-trip')
  expect(Number(output.match(/held-out text: ([\d.]+) bytes per token/)?.[1])).toBeGreaterThan(3)
  const file = join(folder, 'tokenizer.json')
  expect(existsSync(file)).toBe(true)
  expect(JSON.parse(readFileSync(file, 'utf8')).model.type).toBe('BPE')
})

test('several-ranks: two ranks of one process train together, and end with the same weights', async () => {
  const output = await runSuccessfully('several-ranks.ts', '12')
  const [, before, after] = output.match(/^loss ([\d.]+) to ([\d.]+) in 12 steps of 2 x 2 rows$/m) ?? []
  expect(Number(after)).toBeLessThan(Number(before))
  const [, first, second] = output.match(/^norms of the weights on 2 ranks: (\S+) (\S+)$/m) ?? []
  expect(first).toBe(second)
})

test('pipeline: stages on two ranks have the same losses as one rank', async () => {
  const output = await runSuccessfully('pipeline.ts', '10')
  const rows = [...output.matchAll(/^step (\d+): loss ([\d.]+) in stages, ([\d.]+) on one rank$/gm)].map(row =>
    row.slice(1).map(Number),
  )
  expect(rows.map(([step]) => step)).toEqual([1, 5, 10])
  for (const [, inStages, alone] of rows) expect(inStages).toBeCloseTo(alone, 2)
  expect(rows[2][1]).toBeLessThan(rows[0][1] - 0.3)
  expect(output).toMatch(/^rank 0 trains stages 0 and 3, \d+ parameters$/m)
  expect(output).toMatch(/^Fellow citizens.+$/m)
})

test('experts-on-ranks: two ranks with sharded experts have the same losses as one', async () => {
  const output = await runSuccessfully('experts-on-ranks.ts', '10')
  const rows = [...output.matchAll(/^step (\d+): loss ([\d.]+) on 2 ranks, ([\d.]+) on one$/gm)].map(row =>
    row.slice(1).map(Number),
  )
  expect(rows.map(([step]) => step)).toEqual([1, 5, 10])
  for (const [, spread, alone] of rows) expect(spread).toBeCloseTo(alone, 2)
  expect(rows[2][1]).toBeLessThan(rows[0][1] - 0.3)
  const [, own, all] = output.match(/^rank 1 trains (\d+) of (\d+) parameters$/m) ?? []
  expect(Number(own)).toBeLessThan(0.8 * Number(all))
  expect(output).toMatch(/^Fellow citizens.+$/m)
})
