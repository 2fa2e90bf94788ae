// Prints the device's properties as JSON, with the versions of cuBLASLt and NCCL (given by MOE_CUDA_CUBLASLT and MOE_NCCL_LIBRARY, or found).
import { createBackend } from '@moe/kernels-cuda'
import { openNccl } from '../../packages/parallel/src/nccl/library.ts'

const backend = await createBackend(process.env.MOE_CUDA_CUBLASLT ? {} : { cublasLt: true })
const { name, capability, multiprocessors, totalMemory, driverVersion } = backend.properties
const { cublasLt } = backend
const nccl = await openNccl().then(
  ({ version }) => version,
  () => undefined,
)
console.log(JSON.stringify({ name, capability, multiprocessors, totalMemory, driverVersion, cublasLt, nccl }))
backend.dispose()
