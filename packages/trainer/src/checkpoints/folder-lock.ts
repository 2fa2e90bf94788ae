/** @file Allows one training or tokenization per folder at a time: a lock file names the process that writes. */
import { existsSync, mkdirSync, readFileSync, realpathSync, unlinkSync, writeFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import { MoeError } from '@moe/core'

const LOCK_FILE = 'training.lock'

/** Lock files that this process holds. */
const held = new Set<string>()

/**
 * Creates a folder if it is missing, and locks it. Lock files of killed processes are ignored, and so are those of
 * other machines, because nobody can tell whether their processes still run.
 *
 * @returns unlocks the folder
 * @throws MoeError E_CONFIG if another process is writing there, or the folder cannot be written
 */
export function lockFolder(out: string, op = 'train'): () => void {
  const refuse = (problem: string, fix: string, cause?: unknown) =>
    new MoeError({ code: 'E_CONFIG', op, problem, fix, cause })
  try {
    createFolder(out)
    // The native variant also normalizes case on case-insensitive file systems.
    const path = join(realpathSync.native(out), LOCK_FILE)
    // If a killed process left the file behind, remove it and try again.
    if (!created(path)) {
      const owner = ownerOf(path)
      if (owner !== undefined) {
        throw refuse(
          `process ${owner} is writing to ${out}`,
          `wait for it, or choose another out (if that process is unrelated, remove ${path})`,
        )
      }
      unlinkIfPresent(path)
      if (!created(path)) throw refuse(`another process is starting in ${out}`, 'wait for it, or choose another out')
    }
    held.add(path)
    return () => {
      held.delete(path)
      try {
        unlinkSync(path)
      } catch {
        // The lock of a process that ended is ignored. An error here would hide the one that ended the run.
      }
    }
  } catch (cause) {
    if (cause instanceof MoeError) throw cause
    throw refuse(`the folder ${out} cannot be used: ${(cause as Error).message}`, 'choose another out', cause)
  }
}

/** Creates a folder and those above it. */
function createFolder(path: string): void {
  try {
    mkdirSync(path, { recursive: true })
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
    // Node reports ENOENT for a read-only file system. The first missing folder alone fails with the actual reason.
    let first = resolve(path)
    while (!existsSync(dirname(first))) first = dirname(first)
    mkdirSync(first)
    throw error
  }
}

function unlinkIfPresent(path: string): void {
  try {
    unlinkSync(path)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
  }
}

/** Creates the lock file. @returns false if it already exists */
function created(path: string): boolean {
  try {
    writeFileSync(path, `${process.pid} ${hostname()}\n`, { flag: 'wx' })
    return true
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false
    throw error
  }
}

/** The process that holds a lock file, if it is still running on this machine. */
function ownerOf(path: string): number | undefined {
  const [pid, host] = readFileSync(path, 'utf8').trim().split(' ')
  if (host !== hostname()) return undefined
  // In a container, an earlier process may have had the same id.
  if (Number(pid) === process.pid) return held.has(path) ? process.pid : undefined
  return runs(Number(pid)) ? Number(pid) : undefined
}

function runs(pid: number): boolean {
  try {
    process.kill(pid, 0)
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM'
  }
  return !isZombie(pid)
}

/**
 * Whether a process has ended but was not reaped, as in a container whose first process never waits for others. It
 * still accepts signals.
 */
function isZombie(pid: number): boolean {
  try {
    return /^State:\s*Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))
  } catch {
    return false // not Linux
  }
}

/** Whether a training is writing to a folder; undefined if the lock was created on another machine. */
export function isLocked(out: string): boolean | undefined {
  try {
    const path = join(realpathSync.native(out), LOCK_FILE)
    const [, host] = readFileSync(path, 'utf8').trim().split(' ')
    return host === hostname() ? ownerOf(path) !== undefined : undefined
  } catch {
    return false
  }
}
