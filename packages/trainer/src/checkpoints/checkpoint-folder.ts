/**
 * @file The checkpoints of a run on disk: `step-000600` folders that appear whole or not at all, and which of them is
 * the latest.
 */
import { randomBytes } from 'node:crypto'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { mkdir, open, readdir, rename, rm, writeFile } from 'node:fs/promises'
import { basename, dirname, join, resolve } from 'node:path'
import { pathOf, renamePatiently } from '@moe/checkpoint'
import { isMoeError, MoeError } from '@moe/core'

const statePattern = /^step-(\d{6,})$/
const temporaryPrefix = '.writing-'
/** Names the checkpoint that was saved last. */
export const LATEST_FILE = 'latest'

/** Name of the file that makes a checkpoint folder complete. */
export const STATE_FILE = 'trainer.json'

/** Of a run. */
export const CHECKPOINTS_FOLDER = 'checkpoints'

/** Name of a step's checkpoint. */
export const checkpointName = (step: number): string => `step-${String(step).padStart(6, '0')}`

/** Step of a checkpoint by its name; undefined for what is none. */
export function stepOf(name: string): number | undefined {
  const digits = statePattern.exec(name)?.[1]
  return digits === undefined ? undefined : Number(digits)
}

const checkpointsOf = (out: string): string => join(out, CHECKPOINTS_FOLDER)

/** Steps that have a complete checkpoint, ascending. */
function checkpointSteps(folder: string): number[] {
  if (!existsSync(folder)) return []
  return readdirSync(folder)
    .filter(name => existsSync(join(folder, name, STATE_FILE)))
    .flatMap(name => stepOf(name) ?? [])
    .sort((a, b) => a - b)
}

/** Path of the checkpoint that a run saved last, or undefined when it has none. @param out folder of the run */
export function latestCheckpoint(out: string | URL): string | undefined {
  const folder = checkpointsOf(pathOf('latestCheckpoint', out))
  const steps = checkpointSteps(folder)
  if (steps.length === 0) return undefined
  const pointer = join(folder, LATEST_FILE)
  const name = existsSync(pointer) ? readFileSync(pointer, 'utf8').trim() : ''
  const known = steps.some(step => checkpointName(step) === name)
  return join(folder, known ? name : checkpointName(steps[steps.length - 1]))
}

/** Paths of the run's other checkpoints, the latest first. @param path of a checkpoint */
export function otherCheckpoints(path: string): string[] {
  const folder = dirname(resolve(path))
  return checkpointSteps(folder)
    .map(step => join(folder, checkpointName(step)))
    .filter(other => other !== resolve(path))
    .reverse()
}

/**
 * Saves one checkpoint: `write` fills a temporary folder, which is then renamed to its place; `latest` is pointed to
 * it, and of the earlier ones the last `keep - 1` stay. If anything fails, a full disk included, what was written is
 * removed and every earlier checkpoint is whole.
 * @returns path of the checkpoint
 * @throws MoeError E_CHECKPOINT
 */
export async function publishCheckpoint(
  out: string,
  step: number,
  keep: number,
  write: (temporary: string) => Promise<void>,
): Promise<string> {
  const folder = checkpointsOf(out)
  const name = checkpointName(step)
  const path = join(folder, name)
  const temporary = hidden(folder, name)
  const replaced = `${temporary}-replaced`
  try {
    await mkdir(folder, { recursive: true })
    await removeLeftovers(folder)
    await mkdir(temporary)
    await write(temporary)
    await syncPath(temporary)
    if (existsSync(path)) await renamePatiently(path, replaced)
    await renamePatiently(temporary, path)
    await pointLatest(folder, name)
  } catch (cause) {
    await removeIfPossible(temporary)
    if (existsSync(replaced) && !existsSync(path)) await renamePatiently(replaced, path).catch(() => {})
    throw saveError(latestCheckpoint(out), path, step, cause)
  }
  await removeIfPossible(replaced)
  const earlier = checkpointSteps(folder).filter(other => other < step)
  for (const old of earlier.slice(0, Math.max(0, earlier.length - (keep - 1)))) {
    await discard(folder, checkpointName(old))
  }
  return path
}

/** Path of something in the folder that is no checkpoint yet, or no longer. */
const hidden = (folder: string, name: string): string =>
  join(folder, `${temporaryPrefix}${name}-${process.pid}-${randomBytes(4).toString('hex')}`)

/** Removes a checkpoint, which is whole or none at every moment. Where a file of it is open (Windows), it may stay until a later save. */
async function discard(folder: string, name: string): Promise<void> {
  const discarded = hidden(folder, name)
  await rename(join(folder, name), discarded).catch(() => {})
  await removeIfPossible(discarded)
}

/** What cannot be removed, not even after a second, is a leftover for the next save. */
async function removeIfPossible(path: string): Promise<void> {
  await rm(path, { recursive: true, force: true, maxRetries: 4 }).catch(() => {})
}

async function pointLatest(folder: string, name: string): Promise<void> {
  const temporary = join(folder, `.${LATEST_FILE}.tmp`)
  await writeFile(temporary, `${name}\n`)
  await renamePatiently(temporary, join(folder, LATEST_FILE))
  await syncPath(folder)
}

/** What a killed process left half written, and what could not be removed before. */
async function removeLeftovers(folder: string): Promise<void> {
  for (const name of await readdir(folder)) {
    if (name.startsWith(temporaryPrefix)) await removeIfPossible(join(folder, name))
  }
}

/** Makes names in a folder survive a power failure, where the system can flush folders. */
async function syncPath(path: string): Promise<void> {
  const handle = await open(path, 'r').catch(() => undefined)
  await handle?.sync().catch(() => {})
  await handle?.close()
}

/** What an error says is wrong, without what it says to do: that is for whoever has it as a cause. */
export function reasonOf(cause: unknown): string {
  if (isMoeError(cause)) return `${basename(cause.op)}: ${cause.problem.trimEnd()}`
  return cause instanceof Error ? cause.message : String(cause)
}

/** @param previous path of the checkpoint that was saved last */
export function saveError(previous: string | undefined, path: string, step: number, cause: unknown): MoeError {
  return new MoeError({
    code: 'E_CHECKPOINT',
    op: path,
    problem: `saving step ${step} failed: ${reasonOf(cause)}`,
    fix:
      previous === undefined
        ? 'the run has no earlier checkpoint; free some space, close what has its files open, or choose another folder'
        : `${previous} is whole: free some space or close what has files of the run open, and resume from it`,
    details: { step, previous },
    cause,
  })
}
