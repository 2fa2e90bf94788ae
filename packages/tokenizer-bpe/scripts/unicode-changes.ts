/**
 * @file Computes CHANGES and HASH of src/unicode/engine-classes.ts from the npm packages `@unicode/unicode-VERSION` of
 * 15.0.0, 15.1.0, 16.0.0 and 17.0.0, and prints them.
 *
 *   node packages/tokenizer-bpe/scripts/unicode-changes.ts FOLDER_WITH_NODE_MODULES
 */
import { resolve } from 'node:path'
import { pathToFileURL } from 'node:url'
import { CLASS_LETTERS, CODE_POINTS } from '../src/unicode/classes.ts'
import { hashOfClasses } from '../src/unicode/engine-classes.ts'
import { fillFromTable } from '../src/unicode/pinned-classes.ts'

const CATEGORIES = [
  'Uppercase_Letter',
  'Titlecase_Letter',
  'Lowercase_Letter',
  'Modifier_Letter',
  'Other_Letter',
  'Mark',
  'Number',
  'Punctuation',
  'Symbol',
]

async function classesOf(version: string): Promise<Uint8Array> {
  const classes = new Uint8Array(CODE_POINTS)
  for (const [i, category] of CATEGORIES.entries()) {
    const path = `node_modules/@unicode/unicode-${version}/General_Category/${category}/code-points.mjs`
    const { default: codes } = await import(pathToFileURL(resolve(process.argv[2], path)).href)
    for (const code of codes as number[]) classes[code] = i + 1
  }
  return classes
}

const pinned = await classesOf('16.0.0')
const others = await Promise.all(['15.0.0', '15.1.0', '17.0.0'].map(classesOf))
let changes = ''
let done = 0
for (let code = 0; code < CODE_POINTS; code++) {
  const differs = (at: number) => pinned[at] === pinned[code] && others.some(other => other[at] !== pinned[at])
  if (!differs(code)) continue
  const first = code
  while (differs(code + 1)) code++
  const base36 = (n: number) => n.toString(36).toUpperCase()
  changes += `${CLASS_LETTERS[pinned[first]]}${base36(first - done)}${code > first ? `-${base36(code - first)}` : ''}`
  done = code + 1
}
fillFromTable()
console.log(changes)
console.log(hashOfClasses())
