import { readdirSync, readFileSync } from 'node:fs'
import { extname, join } from 'node:path'
import { expect, test } from 'vitest'

interface Manifest {
  name: string
  version: string
  files: string[]
  publishConfig: { os?: string[]; cpu?: string[]; libc?: string[] }
  optionalDependencies?: Record<string, string>
}

const root = join(import.meta.dirname, '..')
const script = join(root, 'scripts', 'platforms.mjs')
const { platforms, libraryName } = (await import(script)) as {
  platforms: Record<string, { os: string; cpu: string; libc?: string }>
  libraryName: (isa: string, os: string) => string
}
const manifestIn = (folder: string): Manifest => JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8'))

test('every platform has a package, which this one brings', () => {
  const names = Object.keys(platforms).sort()
  expect(readdirSync(join(root, 'npm')).sort()).toEqual(names)
  const wanted = manifestIn(root).optionalDependencies
  expect(wanted).toEqual(Object.fromEntries(names.map(name => [`@moe/kernels-cpu-${name}`, 'workspace:*'])))
})

test.each(Object.keys(platforms))('%s is installed where it runs, with its libraries, in the same version', name => {
  const { os, cpu, libc } = platforms[name] as { os: string; cpu: string; libc?: string }
  const manifest = manifestIn(join(root, 'npm', name))
  expect(manifest.name).toBe(`@moe/kernels-cpu-${name}`)
  expect(manifest.version).toBe(manifestIn(root).version)
  const { os: systems, cpu: cpus, libc: libraries } = manifest.publishConfig
  expect([systems, cpus, libraries]).toEqual([[os], [cpu], libc && [libc]])
  expect(manifest.files).toEqual([`*${extname(libraryName('', os))}`])
})
