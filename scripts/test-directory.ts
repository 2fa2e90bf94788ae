// For tests: in-memory folders that behave like a browser's FileSystemDirectoryHandle (WHATWG File System Standard).
import { File } from 'node:buffer'

const fault = (name: string) => new DOMException(`a ${name}`, name)

export class TestDirectory {
  readonly kind = 'directory'
  readonly name: string
  readonly entries = new Map<string, TestFile | TestDirectory>()
  /** Remaining bytes for files, shared with all subfolders. */
  readonly quota: { bytes: number }

  constructor(name = '', quota = { bytes: Number.POSITIVE_INFINITY }) {
    this.name = name
    this.quota = quota
  }

  async getFileHandle(name: string, options: { create?: boolean } = {}): Promise<TestFile> {
    return this.#entry(name, TestFile, options)
  }

  async getDirectoryHandle(name: string, options: { create?: boolean } = {}): Promise<TestDirectory> {
    return this.#entry(name, TestDirectory, options)
  }

  async removeEntry(name: string, { recursive = false } = {}): Promise<void> {
    const entry = this.entries.get(name)
    if (entry === undefined) throw fault('NotFoundError')
    if (entry instanceof TestDirectory && entry.entries.size > 0 && !recursive) throw fault('InvalidModificationError')
    this.entries.delete(name)
  }

  async *keys(): AsyncGenerator<string> {
    yield* [...this.entries.keys()]
  }

  #entry<T extends TestFile | TestDirectory>(
    name: string,
    kind: new (name: string, quota: { bytes: number }) => T,
    { create = false },
  ): T {
    if (name === '' || /^\.{1,2}$|\//.test(name)) throw new TypeError(`invalid file name ${name}`)
    let entry = this.entries.get(name)
    if (entry === undefined && create) {
      entry = new kind(name, this.quota)
      this.entries.set(name, entry)
    }
    if (entry === undefined) throw fault('NotFoundError')
    if (!(entry instanceof kind)) throw fault('TypeMismatchError')
    return entry
  }
}

class TestFile {
  readonly kind = 'file'
  readonly name: string
  readonly #quota: { bytes: number }
  #content = new Uint8Array()

  constructor(name: string, quota: { bytes: number }) {
    this.name = name
    this.#quota = quota
  }

  async getFile() {
    return new File([this.#content], this.name)
  }

  async createWritable() {
    const parts: Uint8Array<ArrayBuffer>[] = []
    return {
      write: async (bytes: Uint8Array<ArrayBuffer>) => {
        this.#quota.bytes -= bytes.length
        if (this.#quota.bytes < 0) throw fault('QuotaExceededError')
        parts.push(bytes.slice())
      },
      close: async () => {
        this.#content = new Uint8Array(await new Blob(parts).arrayBuffer())
      },
      abort: async () => {},
    }
  }
}
