/**
 * @file The checkpoints of a run on disk: `step-000600` folders that appear completely or not at all, and which of them
 *   is the latest.
 */
import { randomBytes } from 'node:crypto'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { mkdir, readdir, rename, rm, writeFile } from 'node:fs/promises'
import { basename, dirname, join, resolve } from 'node:path'
import { flushFolder, pathOf, renameWithRetry } from '@moe/checkpoint'
import { isMoeError, MoeError } from '@moe/core'

const statePattern = /^step-(\d{6,})$/
const temporaryPrefix = '.writing-'
/** File that contains the name of the checkpoint that was saved last. */
export const LATEST_FILE = 'latest'

/** File whose presence makes a checkpoint complete. */
export const STATE_FILE = 'trainer.json'

/**  */
export const CHECKPOINTS_FOLDER = 'checkpoints'

/**  */
export const checkpointName = (step: number): string => `step-${String(step).padStart(6, '0')}`

/** The step of a checkpoint name; undefined for any other name. */
export function stepOf(name: string): number | undefined {
  const digits = statePattern.exec(name)?.[1]
  return digits === undefined ? undefined : Number(digits)
}

const checkpointsOf = (out: string): string => join(out, CHECKPOINTS_FOLDER)

/** Steps after `step` of which a run has a checkpoint. A run that resumes from `step` replaces them. */
export function stepsAfter(out: string, step: number): number[] {
  return checkpointSteps(checkpointsOf(out)).filter(other => other > step)
}

/** Steps with a complete checkpoint, ascending. */
function checkpointSteps(folder: string): number[] {
  if (!existsSync(folder)) return []
  return readdirSync(folder)
    .filter(name => existsSync(join(folder, name, STATE_FILE)))
    .flatMap(name => stepOf(name) ?? [])
    .sort((a, b) => a - b)
}

/** Returns the path of a run's latest checkpoint, or undefined if it has none. @param out folder of the run */
export function latestCheckpoint(out: string | URL): string | undefined {
  const folder = checkpointsOf(pathOf('latestCheckpoint', out))
  const steps = checkpointSteps(folder)
  if (steps.length === 0) return undefined
  const pointer = join(folder, LATEST_FILE)
  const name = existsSync(pointer) ? readFileSync(pointer, 'utf8').trim() : ''
  const known = steps.some(step => checkpointName(step) === name)
  return join(folder, known ? name : checkpointName(steps[steps.length - 1]))
}

/** Paths of the run's other checkpoints, latest first. @param path of a checkpoint */
export function otherCheckpoints(path: string): string[] {
  const folder = dirname(resolve(path))
  return checkpointSteps(folder)
    .map(step => join(folder, checkpointName(step)))
    .filter(other => other !== resolve(path))
    .reverse()
}

/**
 * Saves a checkpoint: `write` fills a temporary folder, which is then renamed. `latest` is updated, and of the earlier
 * checkpoints the last `keep - 1` are kept. If anything fails, for example because the disk is full, the temporary
 * folder is removed and all earlier checkpoints stay intact.
 *
 * @param abandoned steps of checkpoints that do not precede this one, because the run was resumed from before them: none
 *   of the earlier ones is kept
 * @returns the path of the checkpoint
 * @throws MoeError E_CHECKPOINT
 */
export async function publishCheckpoint(
  out: string,
  step: number,
  keep: number,
  write: (temporary: string) => Promise<void>,
  abandoned: readonly number[] = [],
): Promise<string> {
  const folder = checkpointsOf(out)
  const name = checkpointName(step)
  const path = join(folder, name)
  const temporary = temporaryPath(folder, name)
  const replaced = `${temporary}-replaced`
  try {
    await mkdir(folder, { recursive: true })
    await removeLeftovers(folder)
    await mkdir(temporary)
    await write(temporary)
    await flushFolder(temporary)
    if (existsSync(path)) await renameWithRetry(path, replaced)
    await renameWithRetry(temporary, path)
    await pointLatest(folder, name)
  } catch (cause) {
    await removeIfPossible(temporary)
    if (existsSync(replaced) && !existsSync(path)) await renameWithRetry(replaced, path).catch(() => {})
    throw saveError(latestCheckpoint(out), path, step, cause)
  }
  await removeIfPossible(replaced)
  const earlier = checkpointSteps(folder).filter(other => other < step)
  const own = earlier.filter(other => !abandoned.includes(other))
  const kept = keep === 1 ? [] : own.slice(1 - keep)
  for (const old of earlier) if (!kept.includes(old)) await discard(folder, checkpointName(old))
  return path
}

/** Path for a checkpoint that is being written or removed. */
const temporaryPath = (folder: string, name: string): string =>
  join(folder, `${temporaryPrefix}${name}-${process.pid}-${randomBytes(4).toString('hex')}`)

/**
 * Removes a checkpoint. At every moment, it either is complete or does not exist. If one of its files is open
 * (Windows), it may stay until a later save.
 */
async function discard(folder: string, name: string): Promise<void> {
  const discarded = temporaryPath(folder, name)
  await rename(join(folder, name), discarded).catch(() => {})
  await removeIfPossible(discarded)
}

/** Whatever cannot be removed within about a second is left for the next save. */
async function removeIfPossible(path: string): Promise<void> {
  await rm(path, { recursive: true, force: true, maxRetries: 4 }).catch(() => {})
}

async function pointLatest(folder: string, name: string): Promise<void> {
  const temporary = join(folder, `.${LATEST_FILE}.tmp`)
  await writeFile(temporary, `${name}\n`)
  await renameWithRetry(temporary, join(folder, LATEST_FILE))
  await flushFolder(folder)
}

/** Removes what a killed process left incomplete, and what could not be removed earlier. */
async function removeLeftovers(folder: string): Promise<void> {
  for (const name of await readdir(folder)) {
    if (name.startsWith(temporaryPrefix)) await removeIfPossible(join(folder, name))
  }
}

/** The problem of an error without its fix, for use in another error. */
export function reasonOf(cause: unknown): string {
  if (isMoeError(cause)) return `${basename(cause.op)}: ${cause.problem.trimEnd()}`
  return cause instanceof Error ? cause.message : String(cause)
}

/** @param previous path of the checkpoint that was saved last */
export function saveError(previous: string | undefined, path: string, step: number, cause: unknown): MoeError {
  const failedInFileSystem = !isMoeError(cause) || cause.details.errno !== undefined
  const fix =
    (!failedInFileSystem && cause.fix) ||
    'free disk space, make the folder writable, close programs that have its files open, or choose another folder'
  return new MoeError({
    code: 'E_CHECKPOINT',
    op: path,
    problem: `saving step ${step} failed: ${reasonOf(cause)}`,
    fix:
      previous === undefined
        ? `the run has no earlier checkpoint; ${fix}`
        : `${previous} is intact; ${fix}, then resume from it`,
    details: { step, previous },
    cause,
  })
}
