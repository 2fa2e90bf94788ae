// Prints what the device is, as JSON, with the version of the cuBLASLt that MOE_CUDA_CUBLASLT names, or that is found.
import { createBackend } from '@moe/kernels-cuda'

const backend = await createBackend(process.env.MOE_CUDA_CUBLASLT ? {} : { cublasLt: true })
const { name, capability, multiprocessors, totalMemory, driverVersion } = backend.properties
console.log(
  JSON.stringify({ name, capability, multiprocessors, totalMemory, driverVersion, cublasLt: backend.cublasLt }),
)
backend.dispose()
