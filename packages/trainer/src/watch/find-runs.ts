/** @file Runs below a folder. */
import { readdir } from 'node:fs/promises'
import { basename, join, resolve } from 'node:path'

const deepest = 5
const mostFolders = 5000
const logs: ReadonlySet<string> = new Set(['metrics.jsonl', 'events.jsonl'])

/**
 * Folders that have a log of a run, the folder itself among them, by their path below it. Checkpoints, hidden folders and links are not looked into, nor
 * runs within runs.
 */
export async function findRuns(folder: string): Promise<Map<string, string>> {
  const runs = new Map<string, string>()
  let level = [{ name: '', path: resolve(folder) }]
  let looked = 0
  for (let depth = 0; depth <= deepest && level.length > 0; depth++) {
    const below: typeof level = []
    for (const { name, path } of level) {
      if (++looked > mostFolders) return runs
      const entries = await readdir(path, { withFileTypes: true }).catch(() => [])
      if (entries.some(entry => entry.isFile() && logs.has(entry.name))) {
        runs.set(name || basename(path), path)
        continue
      }
      for (const entry of entries) {
        if (!entry.isDirectory() || /^\.|^node_modules$|^checkpoints$/.test(entry.name)) continue
        below.push({ name: name ? `${name}/${entry.name}` : entry.name, path: join(path, entry.name) })
      }
    }
    level = below
  }
  return runs
}
