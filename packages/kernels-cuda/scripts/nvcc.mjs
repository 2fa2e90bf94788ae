import { spawnSync } from 'node:child_process'

/** Of the CUDA toolkit, "13.0"; undefined without one. */
export function nvccVersion() {
  const found = spawnSync('nvcc', ['--version'], { encoding: 'utf8' })
  return found.status === 0 ? found.stdout.match(/release ([\d.]+)/)?.[1] : undefined
}
