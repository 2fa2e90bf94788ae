// Translates PTX sources for the emulator: tests written in PTX, and on request all kernels, compiled to PTX by nvcc. Plain Node >= 20.
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { basename, dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { dependencies, hash, run } from '../../../kernels-cpu/scripts/objects.mjs'
import { nvccVersion } from '../nvcc.mjs'
import { translate } from './translate.mjs'

/**
 * Replaces PTX sources `{ file, module }` by C++, and with `ptx` (an architecture) also every kernel except the emulator's own tests. The C++ is written to
 * `<ptxDir>/<name>.cc`, next to nvcc's PTX, if the sources changed.
 * @returns {{ sources: object[], failed: { label: string, output: string }[] }}
 */
export async function translateSources(sources, { root, ptxDir, ptx: arch, only, force }) {
  mkdirSync(ptxDir, { recursive: true })
  const version = arch && nvccVersion()
  if (arch && version === undefined)
    return { sources, failed: [{ label: 'PTX', output: 'no nvcc; install the CUDA toolkit and run this again' }] }
  const key = hash([version, arch, ...translator()].join(' '))
  const isKernel = ({ module }) => module && module !== 'emulator-tests'
  const isTranslated = source => source.file.endsWith('.ptx') || (arch && isKernel(source))
  const kept = sources.filter(source => !isTranslated(source))
  const replaced = sources
    .filter(source => isTranslated(source) && isFor(source.module, arch))
    .map(({ file, module }) => ({ from: file, module, file: join(ptxDir, `${basename(file)}.cc`), translated: true }))
  const queue = replaced.filter(({ module }) => !only || only.includes(module))
  const failed = []
  const worker = async () => {
    for (let next = queue.shift(); next; next = queue.shift()) {
      const output = await translateSource(next, { root, arch, key, force })
      if (output !== '') failed.push({ label: basename(next.from), output })
    }
  }
  await Promise.all(Array.from({ length: Math.min(2, availableParallelism()) }, worker))
  return { sources: [...kept, ...replaced.filter(({ file }) => existsSync(file))], failed }
}

/** The sources of the translator: if one changes, every module is translated again. */
function translator() {
  const folder = dirname(fileURLToPath(import.meta.url))
  return readdirSync(folder)
    .sort()
    .map(name => readFileSync(join(folder, name)))
}

/** Whether a module is for this architecture; modules for a single one have it in their name. */
function isFor(module, arch) {
  const only = module.match(/-sm(\w+)$/)?.[1]
  return only === undefined || only === arch
}

/** Returns '' on success, otherwise the error. */
async function translateSource({ from, module, file }, { root, arch, key, force }) {
  const stamp = `${file}.json`
  if (!force && existsSync(file) && existsSync(stamp)) {
    const known = JSON.parse(readFileSync(stamp, 'utf8'))
    const isSame = ([path, digest]) => existsSync(join(root, path)) && hash(readFileSync(join(root, path))) === digest
    if (known.key === key && Object.entries(known.inputs).every(isSame)) return ''
  }
  let ptx = from
  let inputs = [`emulator/tests/${basename(from)}`]
  if (!from.endsWith('.ptx')) {
    ptx = file.replace(/\.cu\.cc$/, '.ptx')
    const depFile = `${ptx}.d`
    const flags = ['-ptx', '-std=c++17', '-O3', '-lineinfo', `-arch=compute_${arch}`, `-I${join(root, 'device')}`]
    const { code, output } = await run('nvcc', [...flags, '-MD', '-MF', depFile, '-o', ptx, from], 'pipe')
    if (code !== 0) return output || `exit code ${code}`
    inputs = dependencies(depFile, root)
    rmSync(depFile)
  }
  try {
    writeFileSync(file, translate(readFileSync(ptx, 'utf8'), { module, file: basename(ptx) }))
  } catch (error) {
    return error.message
  }
  const digests = inputs.map(path => [path, hash(readFileSync(join(root, path)))])
  writeFileSync(stamp, JSON.stringify({ key, inputs: Object.fromEntries(digests) }))
  return ''
}
