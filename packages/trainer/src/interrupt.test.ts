import type { ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { afterEach, expect, test } from 'vitest'
import { sendSignal, startProgram } from '../../../scripts/test-program.ts'
import { latestCheckpoint } from './checkpoints/checkpoint-folder.ts'
import { watchInterrupts } from './interrupt.ts'
import { readMetrics } from './report/metrics-log.ts'
import { removeTemporaryFolders, temporaryFolder } from './test-model.ts'

afterEach(removeTemporaryFolders)

function start(...args: string[]) {
  const child = startProgram([fileURLToPath(new URL('./test-process.ts', import.meta.url)), ...args])
  const output = { text: '', errors: '' }
  child.stdout.on('data', data => {
    output.text += data
  })
  child.stderr.on('data', data => {
    output.errors += data
  })
  return { child, output }
}

/** Resolves once the process has printed `text`. */
async function printed(child: ChildProcess, output: { text: string; errors: string }, text: string) {
  while (!output.text.includes(text)) {
    if (child.exitCode !== null) throw new Error(`the process ended: ${output.errors}`)
    await new Promise(resolve => setTimeout(resolve, 10))
  }
}

test('Ctrl-C finishes the step, saves, explains how to resume, and the next run continues', async () => {
  const out = await temporaryFolder()
  const first = start(out)
  await printed(first.child, first.output, 'step 20\n')
  sendSignal(first.child, 'SIGINT')
  expect(await once(first.child, 'exit')).toEqual([130, null])
  const steps = readMetrics(`${out}/metrics.jsonl`).length
  expect(steps).toBeGreaterThanOrEqual(20)
  const checkpoint = latestCheckpoint(out)
  expect(first.output.errors).toContain('note SIGINT: training stops after the current step; a second signal exits')
  expect(checkpoint).toMatch(new RegExp(`step-0*${steps}$`))
  expect(first.output.errors).toContain(
    `interrupted after step ${steps} of 100000: saved ${checkpoint}; run the same command`,
  )
  const second = start(out)
  await printed(second.child, second.output, 'step ')
  sendSignal(second.child, 'SIGTERM')
  await once(second.child, 'exit')
  const lines = readMetrics(`${out}/metrics.jsonl`)
  expect(lines.length).toBeGreaterThan(steps)
  expect(lines.map(({ step }) => step)).toEqual(lines.map((_, i) => i + 1))
})

test('a run continues if the pipe of its progress is closed', async () => {
  const out = await temporaryFolder()
  const { child, output } = start(out)
  child.stderr.destroy()
  await printed(child, output, 'step 40\n')
  sendSignal(child, 'SIGINT')
  expect(await once(child, 'exit')).toEqual([130, null])
  expect(latestCheckpoint(out)).toBeDefined()
})

test('a signal is reported even if no progress is shown', async () => {
  const { child, output } = start(await temporaryFolder(), 'silent')
  await printed(child, output, 'step 20\n')
  sendSignal(child, 'SIGTERM')
  expect(await once(child, 'exit')).toEqual([130, null])
  expect(output.errors).toBe('SIGTERM: training stops after the current step; a second signal exits at once\n')
})

test('signals in quick succession, as of `timeout`, count as one, and a later one exits at once', async () => {
  const { child, output } = start(await temporaryFolder(), 'hang')
  await printed(child, output, 'step 20\n')
  sendSignal(child, 'SIGTERM')
  // At once, the system would deliver both as one.
  await new Promise(resolve => setTimeout(resolve, 20))
  sendSignal(child, 'SIGTERM')
  await printed(child, output, 'saving')
  await new Promise(resolve => setTimeout(resolve, 600))
  expect(child.exitCode).toBeNull()
  sendSignal(child, 'SIGINT')
  expect(await once(child, 'exit')).toEqual([130, null])
})

test('listens for signals only until it is disposed', () => {
  const before = process.listenerCount('SIGINT')
  const controller = new AbortController()
  const watched = watchInterrupts(controller.signal, true)
  expect(process.listenerCount('SIGINT')).toBe(before + 1)
  expect(watched.signal.aborted).toBe(false)
  controller.abort('enough')
  expect(watched.signal.reason).toBe('enough')
  watched.dispose()
  expect(process.listenerCount('SIGINT')).toBe(before)
  expect(watchInterrupts(AbortSignal.abort('early'), false).signal.reason).toBe('early')
})
