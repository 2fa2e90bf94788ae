/** @file A folder to read from, whatever it is on, and what readers of its files share. */

import { MoeError } from '@moe/core'

/** A file that is read by position. */
export interface OpenFile {
  /** What errors call it. */
  readonly path: string
  /** Its size when it was opened. */
  readonly bytes: number
  /**
   * Fills `into` from `offset` on with at most `length` bytes from `position` on, and resolves to how many there were: at least one unless the file
   * ends before.
   */
  read(into: Uint8Array, offset: number, length: number, position: number): Promise<number>
  /** Gives what is open back. */
  close(): Promise<void>
}

/** A folder to read from. @internal */
export interface Folder {
  /** What errors call it. */
  readonly path: string
  /** What errors call a file of it. */
  pathOf(name: string): string
  /** Undefined where there is no file of this name. @throws MoeError E_CHECKPOINT where that cannot be known, or it cannot be opened */
  open(name: string): Promise<OpenFile | undefined>
}

/** How far reading has come. */
export interface ReadProgress {
  /** Read so far; a file that a server gives only as a whole counts as it arrives. */
  readonly bytes: number
  /** Size of the files that are open. Shards are all opened before the first tensor is read. */
  readonly totalBytes: number
}

/** Makes a request as the global `fetch` does. */
export type Fetch = (
  address: string,
  init: { readonly headers: Readonly<Record<string, string>>; readonly signal?: AbortSignal },
) => Promise<Response>

/** How files are read. */
export interface FolderOptions {
  /**
   * Folder on the disk that the files must lie in after symbolic links are followed. Default: the checkpoint's own folder. A snapshot in
   * the Hugging Face cache consists of links, so pass the `models--...` folder above it.
   */
  readonly root?: string
  /** Makes the requests for an address, in place of the global `fetch`: to add a token, or to try again. */
  readonly fetch?: Fetch
  /** Ends reading: what is being read, and what is read later, throws `E_ABORTED`. */
  readonly signal?: AbortSignal
  /** Called as bytes are read. */
  readonly onProgress?: (progress: ReadProgress) => void
}

/** @internal */
export const folderOptionNames = { root: true, fetch: true, signal: true, onProgress: true } as const

/** What is asked of every read, and told of it, over all files of a folder. */
export class Watch {
  readonly signal: AbortSignal | undefined
  readonly #onProgress: FolderOptions['onProgress']
  #bytes = 0
  #totalBytes = 0

  constructor({ signal, onProgress }: FolderOptions) {
    this.signal = signal
    this.#onProgress = onProgress
  }

  /** @throws MoeError E_ABORTED */
  check(path: string): void {
    if (!this.signal?.aborted) return
    throw new MoeError({ code: 'E_ABORTED', op: path, problem: 'reading was stopped', cause: this.signal.reason })
  }

  /** There are so many more bytes to read. */
  opened(bytes: number): void {
    this.#totalBytes += bytes
  }

  /** So many more bytes were read. */
  arrived(bytes: number): void {
    this.#bytes += bytes
    this.#onProgress?.({ bytes: this.#bytes, totalBytes: this.#totalBytes })
  }

  /** The same file, watched. */
  over(file: OpenFile): OpenFile {
    this.opened(file.bytes)
    return {
      path: file.path,
      bytes: file.bytes,
      read: async (into, offset, length, position) => {
        this.check(file.path)
        const bytes = await file.read(into, offset, length, position)
        this.arrived(bytes)
        return bytes
      },
      close: () => file.close(),
    }
  }
}
