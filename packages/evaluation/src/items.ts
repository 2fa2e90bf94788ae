/** @file Reads the items of a task: lines of JSON, or whole texts. */
import { MoeError, shown } from '@moe/core'
import { dataError, type PlacedItem } from './fields.ts'
import type { Item } from './task.ts'

/**
 * The source of items: the path of a `.jsonl` or `.ndjson` file with one JSON object per line, the path of any other file, whose content becomes the `text` of one item, a
 * list of such paths, or the items themselves.
 */
export type ItemSource = string | URL | ReadonlyArray<string | URL> | Iterable<Item>

/**
 * Reads items.
 * @param name what items passed as objects are called in errors
 * @throws MoeError E_DATA, with file and line, if they cannot be read, or if there are none
 */
export async function readItems(source: ItemSource, name: 'item' | 'example'): Promise<PlacedItem[]> {
  const paths = pathsOf(source)
  const parts: PlacedItem[][] = []
  for (const path of paths ?? []) parts.push(parseItems(await readText(path), String(path)))
  const items = paths === undefined ? givenItems(source as Iterable<Item>, name) : parts.flat()
  if (items.length > 0) return items
  const op = paths === undefined ? 'evaluateTask' : paths.join(', ')
  throw new MoeError({ code: 'E_DATA', op, problem: `there are no ${name}s` })
}

/** The paths of a source; undefined if it consists of items. */
function pathsOf(source: ItemSource): ReadonlyArray<string | URL> | undefined {
  const isPath = (value: unknown) => typeof value === 'string' || value instanceof URL
  if (isPath(source)) return [source as string | URL]
  return Array.isArray(source) && source.length > 0 && source.every(isPath) ? source : undefined
}

async function readText(path: string | URL): Promise<string> {
  const { readFile } = await import('node:fs/promises')
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(await readFile(path))
  } catch (cause) {
    throw dataError(String(path), `cannot read the file: ${(cause as Error).message}`, undefined, cause)
  }
}

function parseItems(text: string, path: string): PlacedItem[] {
  if (!/\.(jsonl|ndjson)$/i.test(path)) return text === '' ? [] : [{ fields: { text }, location: path }]
  // Split at newlines only: JSON strings may contain other line separators of Unicode.
  return text.split('\n').flatMap((line, i) => {
    if (line.trim() === '') return []
    const location = `${path}:${i + 1}`
    let fields: unknown
    try {
      fields = JSON.parse(line)
    } catch (cause) {
      throw dataError(location, `invalid JSON: ${(cause as Error).message}`, undefined, cause)
    }
    return [placed(fields, location)]
  })
}

function givenItems(source: Iterable<Item>, name: string): PlacedItem[] {
  if (typeof (source as Iterable<Item> | undefined)?.[Symbol.iterator] === 'function') {
    return Array.from(source, (fields, i) => placed(fields, `${name} ${i}`))
  }
  const fix = 'pass the path of a .jsonl file, or an array of objects'
  throw new MoeError({ code: 'E_DATA', op: 'evaluateTask', problem: `the ${name}s are ${shown(source)}`, fix })
}

function placed(fields: unknown, location: string): PlacedItem {
  if (typeof fields === 'object' && fields !== null && !Array.isArray(fields))
    return { fields: fields as Item, location }
  throw dataError(location, `the item is ${shown(fields)}, expected an object`)
}
