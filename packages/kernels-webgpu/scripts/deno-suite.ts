/**
 * @file Runs the backend suite in Deno (installed from npm), which uses wgpu. Without a GPU, set VK_ICD_FILENAMES to a software GPU such as Mesa's llvmpipe.
 *
 *   node packages/kernels-webgpu/scripts/deno-suite.ts [part of the names of checks]
 */
import { execFileSync, spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { bundleSuite } from '../../../scripts/bundle-suite.ts'
import { suiteSetup } from './suite-setup.ts'

const hooks = `globalThis.note = console.log
globalThis.report = result => {
  console.log(result)
  Deno.exit(result.failed === 0 ? 0 : 1)
}
`
const work = mkdtempSync(join(tmpdir(), 'moe-deno-suite-'))
try {
  writeFileSync(join(work, 'package.json'), '{}')
  writeFileSync(join(work, 'suite.mjs'), hooks + (await bundleSuite({ ...suiteSetup, part: process.argv[2] })))
  execFileSync('npm', ['install', '--no-audit', '--no-fund', '--loglevel=error', 'deno'], {
    cwd: work,
    stdio: ['ignore', 'ignore', 'inherit'],
    shell: process.platform === 'win32',
  })
  const { status } = spawnSync(join(work, 'node_modules', '.bin', 'deno'), ['run', '--allow-all', 'suite.mjs'], {
    cwd: work,
    stdio: 'inherit',
  })
  process.exitCode = status ?? 1
} finally {
  rmSync(work, { recursive: true, force: true })
}
