/** @file The interface of folders and files that checkpoints are read from and written to, and the options of all readers. */

import { MoeError } from '@moe/core'
import type { Append } from './atomic-file.ts'

/** A file with random access. */
export interface OpenFile {
  /** Path or URL, for error messages. */
  readonly path: string
  /** Size when the file was opened. */
  readonly bytes: number
  /**
   * Reads up to `length` bytes from `position` into `into`, starting at `offset`. Resolves to the number of bytes read: at least one
   * unless the file ends there.
   */
  read(into: Uint8Array, offset: number, length: number, position: number): Promise<number>
  /** Releases the file. */
  close(): Promise<void>
}

/** A folder to read from. @internal */
export interface Folder {
  /** Path or URL, for error messages. */
  readonly path: string
  /** Path or URL of a file in the folder, for error messages. */
  pathOf(name: string): string
  /** Opens a file. Undefined if it does not exist. @throws MoeError E_CHECKPOINT if it cannot be opened */
  open(name: string): Promise<OpenFile | undefined>
}

/** A folder to write to. @internal */
export interface TargetFolder {
  /** Path, for error messages. */
  readonly path: string
  /** Path of a file in the folder, for error messages. */
  pathOf(name: string): string
  /** Names of the files in the folder, which is created if it does not exist. @throws MoeError E_CHECKPOINT */
  names(): Promise<Set<string>>
  /** Writes a file atomically. @throws MoeError E_CHECKPOINT, and any error of `produce` */
  write(name: string, produce: (append: Append) => Promise<void>): Promise<void>
  /** Removes a file if it exists. @throws MoeError E_CHECKPOINT */
  remove(name: string): Promise<void>
  /** Makes renames and removals durable across a power failure, if the system supports it. */
  flush(): Promise<void>
}

/** Writes a text file atomically. @internal */
export const writeText = (folder: TargetFolder, name: string, text: string): Promise<void> =>
  folder.write(name, append => append(new TextEncoder().encode(text)))

/** The progress of reading, over all files of a checkpoint. */
export interface ReadProgress {
  /** Bytes read so far. A file that is downloaded as a whole counts as it arrives. */
  readonly bytes: number
  /** Total size of the open files. All shards are opened before the first tensor is read. */
  readonly totalBytes: number
}

/** A function that performs a request, with the signature of the global `fetch`. */
export type Fetch = (
  address: string,
  init: { readonly headers: Readonly<Record<string, string>>; readonly signal?: AbortSignal },
) => Promise<Response>

/** How files are located and read. */
export interface FolderOptions {
  /**
   * Folder on disk that must contain the files after symbolic links are resolved. Default: the checkpoint's own folder, or, for a single
   * safetensors file, any. Snapshots in the Hugging Face cache consist of links; for these, pass the `models--...` folder above.
   */
  readonly root?: string | undefined
  /** Performs HTTP requests instead of the global `fetch`, for example to add a token or to retry. */
  readonly fetch?: Fetch | undefined
  /** Cancels reading: pending and later reads throw `E_ABORTED`. */
  readonly signal?: AbortSignal | undefined
  /** Called as bytes are read. */
  readonly onProgress?: ((progress: ReadProgress) => void) | undefined
}

/** @internal */
export const folderOptionNames = { root: true, fetch: true, signal: true, onProgress: true } as const

/** Cancels reads and reports their progress, over all files of a folder. */
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
    throw new MoeError({ code: 'E_ABORTED', op: path, problem: 'reading was cancelled', cause: this.signal.reason })
  }

  /** Adds to the number of bytes to read. */
  opened(bytes: number): void {
    this.#totalBytes += bytes
  }

  /** Adds to the number of bytes that were read. */
  arrived(bytes: number): void {
    this.#bytes += bytes
    this.#onProgress?.({ bytes: this.#bytes, totalBytes: this.#totalBytes })
  }

  /** Wraps a file so that its reads are cancelled and reported. */
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
