/** @file Weights and a text file that describes them, which cannot be replaced at the same moment. */
import { writeText } from './folder.ts'
import { type FolderLocation, openFolder, targetFolder } from './locations.ts'
import { readAll } from './read-safetensors.ts'

const MAX_BYTES = 64 * 2 ** 20

/**
 * Writes weights, then a text file that describes them. If the folder contains the file with another text, it is removed just before the
 * weights are replaced: after a crash in between, the folder is refused for the missing file, and does not open as a mixture of old and
 * new. If writing the weights fails, the file is as before. @internal
 *
 * @param write writes the weights, and calls `beforeSwitch` when they are complete, before they replace the old ones
 */
export async function writeWithText<T>(
  op: string,
  location: FolderLocation,
  { name, text }: { readonly name: string; readonly text: string },
  write: (beforeSwitch: () => Promise<void>) => Promise<T>,
): Promise<T> {
  const folder = targetFolder(op, location)
  const file = (await folder.names()).has(name) ? await openFolder(op, location).open(name) : undefined
  const before = file && new TextDecoder().decode(await readAll(file, MAX_BYTES))
  let isRemoved = false
  const result = await write(async () => {
    if (before === undefined || before === text) return
    await folder.remove(name)
    await folder.flush()
    isRemoved = true
  }).catch(async error => {
    if (isRemoved) await writeText(folder, name, before as string).catch(() => {})
    throw error
  })
  await writeText(folder, name, text)
  return result
}
