import { readdirSync, readFileSync } from 'node:fs'
import { extname, join } from 'node:path'
import { expect, test } from 'vitest'
import { levels, librariesOf, libraryName, platformName, platforms } from './platforms.mjs'

interface Manifest {
  name: string
  version: string
  files: string[]
  publishConfig: { os?: string[]; cpu?: string[]; libc?: string[] }
  optionalDependencies?: Record<string, string>
}

interface Platform {
  os: string
  cpu: string
  libc?: string
  isas?: readonly string[]
}

const root = join(import.meta.dirname, '..')
const known: ReadonlyArray<[name: string, platform: Platform]> = Object.entries(platforms)
const manifestIn = (folder: string): Manifest => JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8'))

test('every platform has a package, which is an optional dependency of this one', () => {
  const names = Object.keys(platforms).sort()
  expect(readdirSync(join(root, 'npm')).sort()).toEqual(names)
  const wanted = manifestIn(root).optionalDependencies
  expect(wanted).toEqual(Object.fromEntries(names.map(name => [`@moe/kernels-cpu-${name}`, 'workspace:*'])))
})

test.each(known)('the package for %s has the right os, cpu, libc, files and version', (name, platform) => {
  const { os, cpu, libc } = platform
  // The name under which it is looked up.
  expect(name).toBe(platformName(os, cpu, libc))
  const manifest = manifestIn(join(root, 'npm', name))
  expect(manifest.name).toBe(`@moe/kernels-cpu-${name}`)
  expect(manifest.version).toBe(manifestIn(root).version)
  const { os: systems, cpu: cpus, libc: libraries } = manifest.publishConfig
  expect([systems, cpus, libraries]).toEqual([[os], [cpu], libc && [libc]])
  expect(manifest.files).toEqual([`*${extname(libraryName('', os))}`])
})

test('instruction sets of a platform belong to its architecture and are sorted, lowest first', () => {
  for (const [, { cpu, isas }] of known) {
    const all = Object.keys(levels[cpu as keyof typeof levels])
    expect(isas ?? all).toEqual(all.filter(isa => isas?.includes(isa) ?? true))
  }
})

test('a package contains a library for each instruction set of its platform', () => {
  expect(librariesOf('linux-arm64')).toEqual(['moe-cpu-baseline.so', 'moe-cpu-dotprod.so', 'moe-cpu-bf16.so'])
  expect(librariesOf('darwin-arm64')).toEqual(['moe-cpu-dotprod.dylib', 'moe-cpu-bf16.dylib'])
})
