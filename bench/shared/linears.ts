/** DeepSeek-V3's linear layers, [in, out]. */
export const linears = {
  q_a_proj: [7168, 1536],
  q_b_proj: [1536, 24576],
  kv_a_proj: [7168, 576],
  kv_b_proj: [512, 32768],
  o_proj: [16384, 7168],
  'dense mlp up': [7168, 18432],
} as const
