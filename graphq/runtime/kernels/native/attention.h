// Attention of a few queries over keys and values as a cache holds them. Filled by ctypes (graphq/runtime/kernels/attention.py).
#pragma once
#include "weight.h"

struct Attention {
  const void *q, *k, *v;  // [batch, heads, queries, width], [batch, kv_heads, tokens, width], [.., tokens, v_width]
  const void *mask;       // [batch, heads, queries, tokens], broadcast by strides of 0: bytes, 0 to leave out, or what is
                          // added, in float32 or bfloat16; or null
  void *out;              // [batch, queries, heads, v_width], contiguous
  int64_t batch, heads, kv_heads, queries, tokens, width, v_width;  // of widths multiples of 16
  int64_t q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row;  // strides, in elements
  int64_t mask_batch, mask_head, mask_row, mask_token;
  double scale;
  int32_t type, mask_type;  // float32 or bfloat16; of the mask, or INT8
};

// One key/value head of one batch: its queries are those of heads / kv_heads heads. 1 where there is no memory.
namespace portable { int attention(const Attention &, int64_t head); }
namespace avx2 { int attention(const Attention &, int64_t head); }
namespace avx512 { int attention(const Attention &, int64_t head); }
