import { spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'

function installed(name: string): boolean {
  try {
    createRequire(import.meta.url).resolve(name)
    return true
  } catch {
    return false
  }
}

test('prints what to install if tfjs-node-gpu is missing, and trains if it works', () => {
  const out = mkdtempSync(join(tmpdir(), 'gpu-tfjs-'))
  const script = fileURLToPath(new URL('gpu-tfjs.ts', import.meta.url))
  const args = [script, '--steps', '2', '--addresses', '4', '--out', join(out, 'run')]
  const { status, stdout, stderr } = spawnSync(process.execPath, args, { encoding: 'utf8' })
  rmSync(out, { recursive: true })
  if (installed('@tensorflow/tfjs-node-gpu')) {
    // Without a GPU it must fail rather than fall back silently.
    expect(stdout).toMatch(status === 0 ? /bits per byte/ : /no GPU|not installed|failed to load/)
  } else {
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    expect(stdout).toContain('npm install @tensorflow/tfjs-node-gpu')
    expect(stdout).toContain('npm start')
  }
})
