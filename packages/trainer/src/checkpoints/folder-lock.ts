/** @file Allows one training or tokenization per folder at a time: a lock file names the process that writes. */
import { existsSync, mkdirSync, readFileSync, realpathSync, renameSync, unlinkSync, writeFileSync } from 'node:fs'
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
      const text = lockText(path)
      const owner = ownerOf(path, text)
      if (owner !== undefined) {
        throw refuse(
          `process ${owner} is writing to ${out}`,
          `wait for it, or choose another out (if that process is unrelated, remove ${path})`,
        )
      }
      if (!removed(path, text) || !created(path))
        throw refuse(`another process is starting in ${out}`, 'wait for it, or choose another out')
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

/**
 * Removes a stale lock file with the given text. Of several processes that found it, only one may, because the others
 * would remove the lock of the first.
 *
 * @returns false if another process was faster
 */
function removed(path: string, text: string): boolean {
  const aside = `${path}-${process.pid}`
  try {
    // Only one process can rename a file, and then nobody else changes it.
    renameSync(path, aside)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false
    throw error
  }
  const isStale = readFileSync(aside, 'utf8') === text
  if (isStale) unlinkSync(aside)
  else renameSync(aside, path)
  return isStale
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

/** The text of a lock file: a process id and a host name; empty if its process was killed while writing it. */
function lockText(path: string): string {
  const text = readFileSync(path, 'utf8')
  if (text !== '') return text
  // Its process may be about to write it.
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 50)
  return readFileSync(path, 'utf8')
}

/** The process that holds a lock file with the given text, if it is still running on this machine. */
function ownerOf(path: string, text: string): number | undefined {
  const [pid, host] = text.trim().split(' ')
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
    const text = readFileSync(path, 'utf8')
    const [, host] = text.trim().split(' ')
    return host === hostname() ? ownerOf(path, text) !== undefined : undefined
  } catch {
    return false
  }
}
