/** @file Prepares training data: fill-in-the-middle, chat templates, packing, random splitting of merged tokens. */
export {
  type ChatConfig,
  type ChatMessage,
  type ChatOptions,
  ChatTemplate,
  plainChatTemplate,
} from './chat-template.ts'
export {
  DEEPSEEK_FIM_TOKENS,
  type FillInTheMiddleOptions,
  type FimTokens,
  fillInTheMiddle,
  fillInTheMiddlePrompt,
} from './fill-in-the-middle.ts'
export { type PackedSequence, type PackOptions, packDocuments } from './pack-documents.ts'
export { randomNumbers } from './random.ts'
export { MergedTokenSplitter, type SplitTokensOptions } from './split-tokens.ts'
