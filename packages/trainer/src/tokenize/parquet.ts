/** @file Reads the documents of a Parquet file, one row group at a time. Loaded only if there is such a file. */
import { statSync } from 'node:fs'
import { type Texts, textOf, unreadable } from './record.ts'

/** Approximate number of characters to return at a time. */
const PART = 1 << 22

/** Yields the texts of a column, starting at a row. */
export async function* parquetTexts(path: string, from: number, column: string): AsyncGenerator<Texts> {
  const [{ asyncBufferFromFile, parquetMetadataAsync, parquetReadObjects }, { compressors }] = await Promise.all([
    import('hyparquet'),
    import('hyparquet-compressors'),
  ])
  const file = await asyncBufferFromFile(path)
  const metadata = await parquetMetadataAsync(file)
  const columns = metadata.schema.slice(1).map(({ name }) => name)
  if (!columns.includes(column))
    throw unreadable(
      path,
      `no column ${column}, only ${columns.join(', ')}`,
      'name the column that contains the text: --field NAME, { field }',
    )
  const rows = metadata.row_groups.reduce((sum, group) => sum + Number(group.num_rows), 0)
  const { size } = statSync(path)
  const bytesRead = (row: number) => Math.floor((size * row) / rows)
  let end = 0
  for (const group of metadata.row_groups) {
    const start = end
    end += Number(group.num_rows)
    if (end <= from) continue
    const records = await parquetReadObjects({
      file,
      metadata,
      columns: [column],
      rowStart: start,
      rowEnd: end,
      compressors,
    })
    let texts: string[] = []
    let characters = 0
    for (let row = Math.max(from, start); row < end; row++) {
      for (const text of textOf(path, records[row - start], column, () => `row ${row}`)) {
        texts.push(text)
        characters += text.length
      }
      if (characters < PART && row + 1 < end) continue
      yield { texts, next: row + 1, bytesRead: bytesRead(row + 1) }
      texts = []
      characters = 0
    }
  }
}
