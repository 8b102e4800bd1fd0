// Straight-line programs of rows of activations: what lies between attentions, in one call of the library.
// Filled by ctypes (graphq/runtime/kernels/steps.py).
#pragma once
#include "weight.h"

enum StepOp : int32_t {
  STEP_ADD = 0, STEP_SUB = 1, STEP_MUL = 2,  // of two operands
  STEP_COPY = 3, STEP_SQUARE = 4, STEP_RSQRT = 5, STEP_NEG = 6, STEP_RELU = 7, STEP_SIGMOID = 8, STEP_SILU = 9,
  STEP_GELU_TANH = 10,                       // of one
  STEP_MEAN = 11,                            // of each row [n0] of n2 numbers
  STEP_ROLL = 12,                            // each row [n0] of n2 numbers, turned to the right by ``modulus``
  STEP_QUANTIZE = 13,                        // each row [n0] of n2 numbers; ``rule``: of quantize.h
  STEP_PACKED = 14,                          // a linear of n0 rows with a weight in tiles
  STEP_PLAIN = 15,                           // a linear of n0 rows [n2] with a weight [n1, n2] as it is, and a bias or none
  STEP_GROUPED = 16                          // a linear of n0 rows by n1 experts in tiles, cut at the offsets ``d``
};

// Operands are places: p >= 0 the caller's buffer p, p < -1 the scratch memory from byte -2 - p on, -1 none.
// Operand b of two is read at (i % modulus) * t0 + j * t1 + k * t2 for element [i, j, k] of [n0, n1, n2]; with b = -1 it
// is ``number``. Types are ``Element``; what is computed is float32, and rounded to the type of ``out``.
struct Step {
  int32_t op, a_type, b_type, c_type, d_type, out_type, rule, product, level, unused;
  int64_t a, b, c, d, out, out2, out3;
  int64_t n0, n1, n2, modulus, t0, t1, t2;
  double number;
  const Weight *weight;
};

struct PlainCall {  // y[m, n] = x[m, k] w[n, k]^T + bias
  const float *x;         // float32, [m, k]
  const uint16_t *x_half; // the same in bfloat16, where all of it is exact; else null
  const void *w;          // float32 or bfloat16
  const void *bias;       // or null
  void *y;
  int64_t m, n, k;
  int32_t w_type, bias_type, y_type;
};

namespace portable {
void elementwise(const Step &, const void *a, const void *b, void *out);
void plain(const PlainCall &, int64_t first, int64_t end);  // outputs first .. end
}
namespace avx2 {
void elementwise(const Step &, const void *a, const void *b, void *out);
void plain(const PlainCall &, int64_t first, int64_t end);
}
namespace avx512 {
void elementwise(const Step &, const void *a, const void *b, void *out);
void plain(const PlainCall &, int64_t first, int64_t end);
}
namespace avx512_bf16 { void plain(const PlainCall &, int64_t first, int64_t end); }

int32_t linear(const Call &call, int32_t product, int32_t level, int64_t threads);    // of library.cpp
int32_t grouped(const Call &call, const Grouping &by, int32_t product, int32_t level, int64_t threads);
int32_t quantize_rows(const Quantizing &rows, int32_t level, int64_t threads);
