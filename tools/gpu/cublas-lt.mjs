// Prints the version of the cuBLASLt that MOE_CUDA_CUBLASLT names, or that is found; nothing where there is none to use.
import { createBackend } from '@moe/kernels-cuda'

const backend = await createBackend(process.env.MOE_CUDA_CUBLASLT ? {} : { cublasLt: true })
if (backend.cublasLt !== undefined) console.log(backend.cublasLt)
backend.dispose()
