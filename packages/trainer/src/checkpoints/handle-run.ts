/**
 * @file A run in a browser's directory handle. Step logs are not written there, because browsers copy a file whenever
 *   something is appended.
 */
import {
  type DirectoryHandle,
  type FolderLocation,
  openFolder,
  readAll,
  targetFolder,
  writeText,
} from '@moe/checkpoint'
import { MoeError } from '@moe/core'
import type { TrainResult } from '../result.ts'
import { CHECKPOINTS_FOLDER, checkpointName, LATEST_FILE, STATE_FILE, saveError, stepOf } from './checkpoint-folder.ts'
import type { RunFolder, StoredCheckpoint } from './run-folder.ts'

const SUMMARY_FILE = 'summary.json'
const MAX_STATE_BYTES = 2 ** 26

/** A complete checkpoint in a directory handle. */
interface CheckpointByHandle extends StoredCheckpoint {
  readonly location: DirectoryHandle
}

export class HandleRun implements RunFolder {
  readonly path: string
  readonly listeners = []
  readonly #handle: DirectoryHandle

  constructor(handle: DirectoryHandle) {
    this.#handle = handle
    this.path = targetFolder('train', handle).path
  }

  async latest() {
    const checkpoints = await this.#checkpoints()
    if (checkpoints === undefined) return undefined
    const all = await this.#complete(checkpoints)
    const name = (await textOf(checkpoints, LATEST_FILE))?.trim()
    return all.find(({ path }) => path === this.#pathOf(name)) ?? all.at(-1)
  }

  async named(path: string) {
    const checkpoints = await this.#checkpoints()
    const all = checkpoints === undefined ? [] : await this.#complete(checkpoints)
    const found = all.find(checkpoint => path === checkpoint.path)
    if (found !== undefined) return found
    throw new MoeError({
      code: 'E_CHECKPOINT',
      op: path,
      problem: `there is no such checkpoint in ${this.path}`,
      fix: all.length === 0 ? 'start without resume' : `pass one of ${all.map(({ path }) => path).join(', ')}`,
    })
  }

  async others(checkpoint: StoredCheckpoint) {
    const checkpoints = await this.#checkpoints()
    const all = checkpoints === undefined ? [] : await this.#complete(checkpoints)
    return all.filter(({ path }) => path !== checkpoint.path).reverse()
  }

  lock() {
    return () => {}
  }

  async clear() {
    for (const name of [CHECKPOINTS_FOLDER, SUMMARY_FILE]) await remove(this.#handle, name)
  }

  async truncateLogs() {}

  async publish(step: number, keep: number, write: (location: FolderLocation) => Promise<void>) {
    const name = checkpointName(step)
    const path = this.#pathOf(name)
    let checkpoints: DirectoryHandle | undefined
    try {
      checkpoints = await this.#handle.getDirectoryHandle(CHECKPOINTS_FOLDER, { create: true })
      await remove(checkpoints, name)
      const location = await checkpoints.getDirectoryHandle(name, { create: true })
      await write(location)
      await writeText(targetFolder('train', checkpoints), LATEST_FILE, `${name}\n`)
      await this.#removeOld(checkpoints, step, keep)
      return { path, location }
    } catch (cause) {
      if (checkpoints !== undefined) await remove(checkpoints, name).catch(() => {})
      throw saveError((await this.latest())?.path, path, step, cause)
    }
  }

  async writeSummary(result: TrainResult) {
    await writeText(targetFolder('train', this.#handle), SUMMARY_FILE, `${JSON.stringify(result, null, 2)}\n`)
  }

  #checkpoints(): Promise<DirectoryHandle | undefined> {
    return this.#handle.getDirectoryHandle(CHECKPOINTS_FOLDER).catch(unlessMissing)
  }

  /** The complete checkpoints, in ascending order. */
  async #complete(checkpoints: DirectoryHandle): Promise<CheckpointByHandle[]> {
    const found: CheckpointByHandle[] = []
    for (const name of await namesOfSteps(checkpoints)) {
      const location = await checkpoints.getDirectoryHandle(name)
      // A file exists, but is empty, while it is being written.
      if (await textOf(location, STATE_FILE)) found.push({ path: this.#pathOf(name), location })
    }
    return found
  }

  /** Removes all but the last `keep - 1` earlier checkpoints, and incomplete ones that a closed page left behind. */
  async #removeOld(checkpoints: DirectoryHandle, step: number, keep: number): Promise<void> {
    const earlier = (await namesOfSteps(checkpoints)).filter(name => Number(stepOf(name)) < step)
    const paths = new Set((await this.#complete(checkpoints)).map(({ path }) => path))
    const whole = earlier.filter(name => paths.has(this.#pathOf(name)))
    const kept = whole.slice(Math.max(0, whole.length - (keep - 1)))
    for (const name of earlier) if (!kept.includes(name)) await remove(checkpoints, name)
  }

  #pathOf(name: string | undefined): string {
    return `${this.path}/${CHECKPOINTS_FOLDER}/${name}`
  }
}

/** Names of checkpoints in ascending order of steps. */
async function namesOfSteps(checkpoints: DirectoryHandle): Promise<string[]> {
  const names: string[] = []
  for await (const name of checkpoints.keys()) if (stepOf(name) !== undefined) names.push(name)
  return names.sort((a, b) => Number(stepOf(a)) - Number(stepOf(b)))
}

async function textOf(folder: DirectoryHandle, name: string): Promise<string | undefined> {
  const file = await openFolder('train', folder).open(name)
  return file && new TextDecoder().decode(await readAll(file, MAX_STATE_BYTES))
}

const remove = (folder: DirectoryHandle, name: string) =>
  folder.removeEntry(name, { recursive: true }).catch(unlessMissing)

function unlessMissing(error: unknown): undefined {
  if ((error as Error | undefined)?.name !== 'NotFoundError') throw error
}
