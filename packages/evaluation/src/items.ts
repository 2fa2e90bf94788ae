/** @file Items of a task: lines of JSON, or whole texts. */
import { MoeError, shown } from '@moe/core'
import { dataError, type PlacedItem } from './fields.ts'
import type { Item } from './task.ts'

/** Where items come from: a path (of `.jsonl`: a JSON object a line; of any other name: a text, which is `text` of its one item), or the items themselves. */
export type ItemSource = string | URL | Iterable<Item>

/** `name` is what one of those is called that were given as they are. @throws MoeError E_DATA for what cannot be read, with file and line */
export async function readItems(source: ItemSource, name: 'item' | 'example'): Promise<PlacedItem[]> {
  const isPath = typeof source === 'string' || source instanceof URL
  const items = isPath ? parseItems(await readText(source), String(source)) : givenItems(source, name)
  if (items.length > 0) return items
  const op = isPath ? String(source) : 'evaluateTask'
  throw new MoeError({ code: 'E_DATA', op, problem: `there are no ${name}s` })
}

async function readText(path: string | URL): Promise<string> {
  const { readFile } = await import('node:fs/promises')
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(await readFile(path))
  } catch (cause) {
    throw dataError(String(path), `cannot be read: ${(cause as Error).message}`, undefined, cause)
  }
}

function parseItems(text: string, path: string): PlacedItem[] {
  if (!/\.(jsonl|ndjson)$/i.test(path)) return text === '' ? [] : [{ fields: { text }, place: path }]
  // Not all line separators of Unicode end a line of JSON.
  return text.split('\n').flatMap((line, i) => {
    if (line.trim() === '') return []
    const place = `${path}:${i + 1}`
    let fields: unknown
    try {
      fields = JSON.parse(line)
    } catch (cause) {
      throw dataError(place, `is no JSON: ${(cause as Error).message}`, undefined, cause)
    }
    return [placed(fields, place)]
  })
}

function givenItems(source: Iterable<Item>, name: string): PlacedItem[] {
  if (typeof (source as Iterable<Item> | undefined)?.[Symbol.iterator] === 'function') {
    return Array.from(source, (fields, i) => placed(fields, `${name} ${i}`))
  }
  const fix = 'pass the path of a .jsonl file, or a list of objects'
  throw new MoeError({ code: 'E_DATA', op: 'evaluateTask', problem: `the ${name}s are ${shown(source)}`, fix })
}

function placed(fields: unknown, place: string): PlacedItem {
  if (typeof fields === 'object' && fields !== null && !Array.isArray(fields)) return { fields: fields as Item, place }
  throw dataError(place, `is ${shown(fields)}, and no object`)
}
