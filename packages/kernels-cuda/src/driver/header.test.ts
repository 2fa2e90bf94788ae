/** @file Compares constants and declarations of the driver API with NVIDIA's header: with values from cuda.h 13.0, and with the header itself if it is installed. */
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { captureRelaxed } from '../graph.ts'
import { attributeMaxDynamicShared } from '../modules.ts'
import { flags } from '../stream.ts'
import { encoding } from '../tensor-map.ts'
import { attribute } from './device.ts'
import { prototypes } from './driver.ts'
import { fatal, fixes, status } from './status.ts'

/** Our constants, by their names in cuda.h, and the header's values. */
const numbers: ReadonlyArray<[name: string, ours: number, header: number]> = [
  ['CUDA_SUCCESS', status.success, 0],
  ['CUDA_ERROR_OUT_OF_MEMORY', status.outOfMemory, 2],
  ['CUDA_ERROR_NO_DEVICE', status.noDevice, 100],
  ['CUDA_ERROR_NO_BINARY_FOR_GPU', status.noBinaryForGpu, 209],
  ['CUDA_ERROR_NOT_READY', status.notReady, 600],
  ['CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT', attribute.multiprocessors, 16],
  ['CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR', attribute.major, 75],
  ['CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR', attribute.minor, 76],
  ['CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN', attribute.sharedMemoryOptIn, 97],
  ['CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES', attribute.usesHostPageTables, 100],
  ['CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES', attributeMaxDynamicShared, 8],
  ['CU_STREAM_NON_BLOCKING', flags.streamNonBlocking, 1],
  ['CU_EVENT_DISABLE_TIMING', flags.eventDisableTiming, 2],
  ['CU_STREAM_CAPTURE_MODE_RELAXED', captureRelaxed, 2],
  ['CU_TENSOR_MAP_DATA_TYPE_UINT8', encoding.uint8, 0],
  ['CU_TENSOR_MAP_DATA_TYPE_BFLOAT16', encoding.bfloat16, 9],
  ['CU_TENSOR_MAP_INTERLEAVE_NONE', encoding.noInterleave, 0],
  ['CU_TENSOR_MAP_SWIZZLE_128B', encoding.swizzle128Bytes, 3],
  ['CU_TENSOR_MAP_L2_PROMOTION_L2_256B', encoding.promoteTo256Bytes, 3],
  ['CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE', encoding.fillWithZeros, 0],
]

/** Statuses with their own advice, by name. */
const advice = {
  2: 'OUT_OF_MEMORY',
  3: 'NOT_INITIALIZED',
  34: 'STUB_LIBRARY',
  46: 'DEVICE_UNAVAILABLE',
  100: 'NO_DEVICE',
  101: 'INVALID_DEVICE',
  200: 'INVALID_IMAGE',
  209: 'NO_BINARY_FOR_GPU',
  218: 'INVALID_PTX',
  222: 'UNSUPPORTED_PTX_VERSION',
  802: 'SYSTEM_NOT_READY',
  803: 'SYSTEM_DRIVER_MISMATCH',
  804: 'COMPAT_NOT_SUPPORTED_ON_DEVICE',
  999: 'UNKNOWN',
}

test.each(numbers)('%s has the value of cuda.h 13.0', (_, ours, header) => expect(ours).toBe(header))
test('the status codes with advice are the listed ones', () => expect(Object.keys(fixes)).toEqual(Object.keys(advice)))

const headers = [process.env['CUDA_HOME'], process.env['CUDA_PATH'], '/usr/local/cuda']
  .map(root => join(root ?? '', 'include', 'cuda.h'))
  .filter(existsSync)
  .map(file => readFileSync(file, 'utf8'))
/** Other versions of the header may declare newer versions of a function. */
const commented = headers.find(text => /#define CUDA_VERSION 13\d{3}\b/.test(text)) ?? ''

describe.skipIf(commented === '')('the installed cuda.h (skipped without a toolkit of CUDA 13)', () => {
  const text = commented.replace(/\/\*[\s\S]*?\*\//g, '').replace(/\/\/.*/g, '')
  const values = new Map<string, number>()
  for (const [, body] of text.matchAll(/\benum\b\s*\w*\s*\{([^}]*)\}/g)) {
    let next = 0
    for (const [, name, given] of body.matchAll(/(\w+)(?:\s*=\s*(0x[\da-fA-F]+|\d+))?[^,]*(?:,|$)/g)) {
      if (given !== undefined) next = Number(given)
      values.set(name, next++)
    }
  }

  test.each(numbers)('defines %s with the expected value', (name, _, header) => expect(values.get(name)).toBe(header))
  test('defines the status codes with advice by the listed names', () => {
    for (const [code, name] of Object.entries(advice)) expect(values.get(`CUDA_ERROR_${name}`)).toBe(Number(code))
  })
  test('describes as unrecoverable only statuses that mark the device as lost', () => {
    const unrecoverable = [
      ...commented.matchAll(/process must be terminated\s+\*?\s*and relaunched\.\s*\*\/\s*CUDA_\w+\s*=\s*(\d+)/g),
    ]
    expect(unrecoverable.length).toBeGreaterThan(8)
    for (const [, code] of unrecoverable) expect(fatal).toContain(Number(code))
  })

  /** The size of a parameter: 8 bytes, or that of an int or a char. */
  const bytesOf = (parameter: string) => {
    if (
      /\*|\[|size_t|long long|64_t|CUdeviceptr|CU(context|stream|event|module|function|graph|graphExec|graphNode)\b/i.test(
        parameter,
      )
    )
      return 8
    return /\bchar\b/.test(parameter) ? 1 : 4
  }
  const parameters = (list: string) => list.split(',').map(bytesOf)
  test.each(Object.entries(prototypes))('declares %s with the same version and parameters', (name, prototype) => {
    const [, symbol, ours] = prototype.match(/^int (\w+)\((.*)\)$/) as RegExpMatchArray
    // The current version of a function is a macro, possibly for the per-thread default stream.
    const versions = [...text.matchAll(new RegExp(`#\\s*define\\s+${name}\\s+(?:__CUDA_API_PT[SD]Z\\()?(\\w+)`, 'g'))]
    const older = ['cuEventElapsedTime'] // Older drivers only provide this version.
    if (!older.includes(name)) expect([name, ...versions.map(([, version]) => version)].at(-1)).toBe(symbol)
    const declared = [...text.matchAll(new RegExp(`CUresult CUDAAPI ${name}\\(([^)]*)\\)`, 'g'))].map(([, list]) =>
      parameters(list),
    )
    expect(declared).toContainEqual(parameters(ours))
  })
})
