/** @file The quickstart as a user runs it, on few addresses and steps: its files, and that Ctrl-C and --resume continue the run bit for bit. */
import { spawn } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { readMetrics } from '@moe/trainer'
import { afterAll, expect, test } from 'vitest'

const folder = mkdtempSync(join(tmpdir(), 'moe-quickstart-'))
afterAll(() => rmSync(folder, { recursive: true }))

const script = fileURLToPath(new URL('quickstart.ts', import.meta.url))

/** Runs it; `onOutput` sees all of standard error so far. */
function run(args: readonly string[], onOutput: (text: string, interrupt: () => void) => void = () => {}) {
  return new Promise<{ code: number | null; stdout: string; stderr: string }>((resolve, reject) => {
    const child = spawn(process.execPath, [script, ...args], { stdio: ['ignore', 'pipe', 'pipe'] })
    let stdout = ''
    let stderr = ''
    child.stdout.on('data', chunk => {
      stdout += chunk
    })
    child.stderr.on('data', chunk => {
      stderr += chunk
      onOutput(stderr, () => child.kill('SIGINT'))
    })
    child.on('error', reject)
    child.on('close', code => resolve({ code, stdout, stderr }))
  })
}

const small = (out: string) => ['--addresses', '4', '--steps', '12', '--batch', '2', '--out', join(folder, out)]
const losses = (out: string) =>
  readMetrics(join(folder, out, 'metrics.jsonl')).map(({ loss, nll, maxVio }) => [loss, nll, maxVio])

test('trains, writes, sums up', async () => {
  const { code, stdout, stderr } = await run([...small('whole'), '--json'])
  expect(code, stderr).toBe(0)
  const summary = JSON.parse(readFileSync(join(folder, 'whole', 'summary.json'), 'utf8'))
  expect(JSON.parse(stdout)).toMatchObject({ steps: 12 })
  expect(summary).toMatchObject({ steps: 12, interrupted: false })
  for (const number of [
    summary.parameters,
    summary.activeParameters,
    summary.tokensPerSecond,
    summary.trainSeconds,
    summary.validation.bitsPerByte,
    summary.balance.maxVio,
    summary.mtp.acceptance,
    summary.peakMemoryBytes,
  ]) {
    expect(number).toBeGreaterThanOrEqual(0)
  }
  expect(typeof summary.backend).toBe('string')
  expect(losses('whole')).toHaveLength(12)
  expect(existsSync(join(summary.checkpoint, 'model', 'model.safetensors'))).toBe(true)
})

test('Ctrl-C saves and says how to go on; --resume continues the same run, bit for bit', async () => {
  let sent = false
  const first = await run(small('parts'), (text, interrupt) => {
    if (sent || !/step +[3-9]\/12/.test(text)) return
    sent = true
    interrupt()
  })
  expect(first.code, first.stderr).toBe(130)
  expect(first.stderr).toMatch(/Stopped after step \d+ of 12\. Go on with: {2}npm start -- .*--resume/)
  expect(losses('parts').length).toBeLessThan(12)
  const second = await run([...small('parts'), '--resume'])
  expect(second.code, second.stderr).toBe(0)
  expect(losses('parts')).toEqual(losses('whole'))
})

test('bad requests say what to do', async () => {
  const { code, stderr } = await run([...small('bad'), '--lr=-1'])
  expect(code).toBe(1)
  expect(stderr).toMatch(/lr is -1, needs a positive number/)
  expect(stderr).not.toMatch(/\n +at /)
})

test('--help', async () => {
  const { code, stdout } = await run(['--help'])
  expect(code).toBe(0)
  expect(stdout).toMatch(/--resume/)
})
