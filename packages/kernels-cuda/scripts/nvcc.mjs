import { spawnSync } from 'node:child_process'

/** Version of the CUDA toolkit, for example "13.0"; undefined if it is not installed. */
export function nvccVersion() {
  const found = spawnSync('nvcc', ['--version'], { encoding: 'utf8' })
  return found.status === 0 ? found.stdout.match(/release ([\d.]+)/)?.[1] : undefined
}
