/** @file For tests only: a backend on the GPU, if there is one. */
import type { Backend } from '@moe/core'
import { createBackend } from './backend.ts'

/** Creates a backend for all tests of a file. Without a GPU it returns null, or throws if MOE_REQUIRE_WEBGPU is 1. */
export async function testBackend(): Promise<Backend | null> {
  try {
    return await createBackend({ software: true })
  } catch (error) {
    if (process.env.MOE_REQUIRE_WEBGPU === '1') throw error
    return null
  }
}
