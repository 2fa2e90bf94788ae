/** @file Finds the runs in a folder. */
import { readdir } from 'node:fs/promises'
import { basename, join, resolve } from 'node:path'

const deepest = 5
const mostFolders = 5000
const logs: ReadonlySet<string> = new Set(['metrics.jsonl', 'events.jsonl'])

/**
 * Folders below `folder` (or `folder` itself) that contain the log of a run, by their relative path. Checkpoints,
 * hidden folders, links, and folders inside runs are not searched.
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
