export { broadcastStrides, mergeAxes, type Nest, rowMajor } from '@moe/core/strides'
