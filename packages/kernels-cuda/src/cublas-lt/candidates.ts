/** @file The places where cuBLASLt may be installed. */
import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'

/** Newest first. */
const names: Readonly<Partial<Record<NodeJS.Platform, readonly string[]>>> = {
  linux: ['libcublasLt.so.13', 'libcublasLt.so.12'],
  win32: ['cublasLt64_13.dll', 'cublasLt64_12.dll'],
}

/**
 * Libraries to try, in order: by name, where the system's loader looks (LD_LIBRARY_PATH, ldconfig; PATH on Windows); then in a CUDA toolkit
 * (CUDA_HOME, CUDA_PATH, /usr/local/cuda); then next to the PyTorch of an active Python environment (VIRTUAL_ENV, CONDA_PREFIX).
 */
export function candidates(env: NodeJS.ProcessEnv, platform: NodeJS.Platform = process.platform): string[] {
  const files = names[platform] ?? []
  const toolkits = [env['CUDA_HOME'], env['CUDA_PATH'], '/usr/local/cuda'].filter(isGiven)
  const environments = [env['VIRTUAL_ENV'], env['CONDA_PREFIX']].filter(isGiven)
  const folders =
    platform === 'win32'
      ? [...toolkits.flatMap(windowsToolkitFolders), ...environments.flatMap(windowsPythonFolders)]
      : [
          ...toolkits.map(root => join(root, 'lib64')),
          ...environments.flatMap(root => [join(root, 'lib'), ...pythonFolders(root)]),
        ]
  const there = folders.flatMap(folder => files.map(file => join(folder, file))).filter(path => existsSync(path))
  return [...files, ...new Set(there)]
}

const isGiven = (path: string | undefined): path is string => path !== undefined && path !== ''

/** The folders of NVIDIA's Python packages: one for CUDA 13, one per library for earlier versions. */
function pythonFolders(root: string): string[] {
  const lib = join(root, 'lib')
  const versions = existsSync(lib) ? readdirSync(lib).filter(name => name.startsWith('python3')) : []
  return versions.sort().flatMap(version => {
    const nvidia = join(lib, version, 'site-packages', 'nvidia')
    return [join(nvidia, 'cu13', 'lib'), join(nvidia, 'cublas', 'lib')]
  })
}

/** `bin/x64` since CUDA 13. */
const windowsToolkitFolders = (root: string): string[] => [join(root, 'bin', 'x64'), join(root, 'bin')]

/** Conda's own folder, and that of PyTorch, which includes the library on Windows. */
const windowsPythonFolders = (root: string): string[] => [
  join(root, 'Library', 'bin'),
  join(root, 'Lib', 'site-packages', 'torch', 'lib'),
]
