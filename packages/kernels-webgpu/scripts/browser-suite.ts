/**
 * @file Runs the backend suite in headless Chromium, on SwiftShader if there is no GPU.
 *
 *   node packages/kernels-webgpu/scripts/browser-suite.ts [part of the names of checks]
 */
import { suiteInChromium } from '../../../scripts/bundle-suite.ts'
import { suiteSetup } from './suite-setup.ts'

await suiteInChromium({ ...suiteSetup, part: process.argv[2] })
