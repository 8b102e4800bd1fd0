// Products for x86 processors with AVX2 and FMA.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>
#include <cstring>
#define GENERIC_AVX2
#include "attention.h"
#include "steps.h"
namespace avx2 {
#include "engine.h"
#include "inputs.h"
#include "generic.h"
#include "quantize.h"
#include "plain.h"
#include "elementwise.h"
#include "attention_head.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "attention.h"
#include "steps.h"
namespace avx2 {
int float32(const Call &call, int64_t threads) { return portable::float32(call, threads); }
int int8(const Call &call, int64_t threads) { return portable::int8(call, threads); }
int quantize(const Quantizing &q, int64_t row) { return portable::quantize(q, row); }
void elementwise(const Step &s, const void *a, const void *b, void *out) { portable::elementwise(s, a, b, out); }
void plain(const PlainCall &c, int64_t first, int64_t end) { portable::plain(c, first, end); }
int attention(const Attention &a, int64_t head) { return portable::attention(a, head); }
}
#endif
