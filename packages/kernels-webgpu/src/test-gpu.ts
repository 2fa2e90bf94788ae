/** @file For tests only: a backend on the GPU, if there is one. */
import type { Backend } from '@moe/core'
import { createBackend } from './backend.ts'

/** A backend for all tests of a file; null if there is no GPU, which MOE_REQUIRE_WEBGPU=1 makes an error. */
export async function testBackend(): Promise<Backend | null> {
  try {
    return await createBackend({ software: true })
  } catch (error) {
    if (process.env.MOE_REQUIRE_WEBGPU === '1') throw error
    return null
  }
}
