/** @file Options of encoding and decoding. */

/** Options of `encode`. */
export interface EncodeOptions {
  /**
   * Adds the special tokens of the post-processor, for example beginning of sentence. Default true, as in Hugging Face
   * tokenizers.
   */
  readonly addSpecialTokens?: boolean | undefined
  /**
   * Whether special tokens in the text become their ids. Default true, as in Hugging Face tokenizers. Pass false for
   * untrusted text (tiktoken's `encode_ordinary`).
   */
  readonly parseSpecialTokens?: boolean | undefined
  /**
   * Whether added tokens in the text become their ids. Default true. With false, tokens that the file does not mark as
   * special are encoded as text, too: in DeepSeek-V3's, these are `<｜User｜>`, `<｜Assistant｜>` and those of tools.
   */
  readonly parseAddedTokens?: boolean | undefined
}

/** Options of `decode`. */
export interface DecodeOptions {
  /** Omits special tokens. Default false. */
  readonly skipSpecialTokens?: boolean | undefined
}
