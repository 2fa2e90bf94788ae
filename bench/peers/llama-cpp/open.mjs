// llama.cpp on the CPU, from its prebuilt binary.
import { getLlama, getModuleVersion, LlamaLogLevel } from 'node-llama-cpp'
import source from './node_modules/node-llama-cpp/llama/llama.cpp.info.json' with { type: 'json' }

/** A sequence over a GGUF file. `exact`: cache and attention in f32, else llama.cpp's defaults (a cache of f16). */
export async function open(modelPath, { threads, contextSize, exact = false }) {
  const llama = await getLlama({
    build: 'never',
    gpu: false,
    skipDownload: true,
    progressLogs: false,
    logLevel: LlamaLogLevel.error,
    maxThreads: threads,
  })
  const model = await llama.loadModel({ modelPath, gpuLayers: 0 })
  const precise = { flashAttention: false, experimentalKvCacheKeyType: 'F32', experimentalKvCacheValueType: 'F32' }
  const context = await model.createContext({ threads, contextSize, ...(exact ? precise : {}) })
  return { model, sequence: context.getSequence() }
}

/** What computes, as text. */
export const device = `llama.cpp ${source.tag}, node-llama-cpp ${await getModuleVersion()}`
