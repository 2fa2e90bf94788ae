/**
 * @file Runs the backend suite in headless Chromium, where there is no GPU on SwiftShader.
 *
 *   node packages/kernels-webgpu/scripts/browser-suite.ts [part of the names of checks]
 */
import { suiteInChromium } from '../../../scripts/bundle-suite.ts'
import { suiteSetup } from './suite-setup.ts'

await suiteInChromium({ ...suiteSetup, part: process.argv[2] })
