/** @file One training, or tokenization, at a time in a folder: a file there names the process that writes. */
import { mkdirSync, readFileSync, realpathSync, rmSync, writeFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { join } from 'node:path'
import { MoeError } from '@moe/core'

const LOCK_FILE = 'training.lock'

/** Lock files of this process. */
const held = new Set<string>()

/**
 * Makes a folder where it is missing and takes it. The file of a process that was killed counts for nothing, nor does
 * one of another machine, where nobody can say whether its process still runs.
 * @returns gives the folder back
 * @throws MoeError E_CONFIG when another training is writing there, or the folder cannot be written
 */
export function lockFolder(out: string, op = 'train'): () => void {
  const refuse = (problem: string, fix: string, cause?: unknown) =>
    new MoeError({ code: 'E_CONFIG', op, problem, fix, cause })
  try {
    mkdirSync(out, { recursive: true })
    // The native one also knows how names are spelled where case makes no difference.
    const path = join(realpathSync.native(out), LOCK_FILE)
    // Taken a second time where it was left behind by a process that was killed.
    if (!created(path)) {
      const owner = ownerOf(path)
      if (owner !== undefined) {
        throw refuse(
          `process ${owner} is writing to ${out}`,
          `wait for it, or choose another out (if it does something else: remove ${path})`,
        )
      }
      rmSync(path, { force: true })
      if (!created(path)) throw refuse(`another process begins in ${out}`, 'wait for it, or choose another out')
    }
    held.add(path)
    return () => {
      held.delete(path)
      rmSync(path, { force: true })
    }
  } catch (cause) {
    if (cause instanceof MoeError) throw cause
    throw refuse(`the folder ${out} cannot be used: ${(cause as Error).message}`, 'choose another out', cause)
  }
}

/** Writes the file unless it is there. */
function created(path: string): boolean {
  try {
    writeFileSync(path, `${process.pid} ${hostname()}\n`, { flag: 'wx' })
    return true
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false
    throw error
  }
}

/** The process that holds a lock file, if it still runs on this machine. */
function ownerOf(path: string): number | undefined {
  const [pid, host] = readFileSync(path, 'utf8').trim().split(' ')
  if (host !== hostname()) return undefined
  // In a container the process before this one had the same number.
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

/** Whether a process has ended and nobody has asked how, as in a container whose first process never does. It still takes signals. */
function isZombie(pid: number): boolean {
  try {
    return /^State:\s*Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))
  } catch {
    return false // no Linux
  }
}

/** Whether a training writes to a folder; undefined where the process that did is of another machine. */
export function isLocked(out: string): boolean | undefined {
  try {
    const path = join(realpathSync.native(out), LOCK_FILE)
    const [, host] = readFileSync(path, 'utf8').trim().split(' ')
    return host === hostname() ? ownerOf(path) !== undefined : undefined
  } catch {
    return false
  }
}
