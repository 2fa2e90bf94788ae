/** @file Heads that Hopper's attention has kernels for: features of keys and of values, to which others are padded. */
export const heads = [
  { dk: 64, dv: 64 },
  { dk: 128, dv: 128 },
  { dk: 192, dv: 128 },
] as const

/** Signature of what every kernel takes at the end: T, S, H, G, Dk, Dv, causal, scale. */
export const sizes = 'i i i i i i i f'
