// Products of bfloat16 inputs for x86 processors with AVX-512 BF16.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,prefer-vector-width=512")
#endif
#include <immintrin.h>
#include <cstring>
#include "steps.h"
namespace avx512_bf16 {
#include "engine.h"
#include "inputs.h"
#include "avx512.h"
#include "plain.h"

struct Bfloat16 : Bfloat16Input {
  using Vec = __m512i;
  using Acc = __m512;
  static constexpr int MAX_M = 16, SUPER = 64, DIRECT = 4;
  template <int B> static constexpr int SPLIT = 1;
  template <int B> static constexpr bool has = true;
  using Tables = Words;
  INLINE __m512 zero() { return _mm512_setzero_ps(); }
  INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  INLINE __m512 mac(__m512 acc, __m512i v, const uint32_t *x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)v, (__m512bh)_mm512_set1_epi32((int)*x));
  }
  INLINE V16 value(const Weight &, __m512 acc, float sum, const uint8_t *zero, int8_t, const int32_t *) {
    return float_value((V16)acc, sum, zero);
  }
  template <int B> INLINE void decode(const uint8_t *p, const Words &words, __m512i *out) { pairs_of<B>(p, words, out); }
};

// 8-bit integers by arithmetic, which leaves the units of products more room than four tables of 64: the float32 of a code,
// exact in bfloat16, is 2^23 + code less 2^23 + 128. Fused, that is 8 % faster at 32 rows and 12 % at 16; else no gain.
struct Integers : Bfloat16 {
  template <int B> static constexpr bool FUSED = B == 8;  // a loss of 4 % at 4 bits
  template <int B> INLINE void decode(const uint8_t *p, const Words &words, __m512i *out) {
    if constexpr (B == 8) {
      const __m512i v = raw(p), low = _mm512_set1_epi32(0xff), whole = _mm512_set1_epi32(0x4b000000);
      const __m512i high = _mm512_set1_epi32((int)0xffff0000);
      const __m512 less = _mm512_set1_ps(0x1p23f + 128);
      const auto number = [&](__m512i code) {  // of code & low | whole
        const __m512i bits = _mm512_ternarylogic_epi32(code, low, whole, 0xea);
        return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(bits), less));
      };
      const auto pair = [&](__m512i a, __m512i b) {  // b & high | a >> 16
        return _mm512_ternarylogic_epi32(b, high, _mm512_srli_epi32(a, 16), 0xea);
      };
      out[0] = pair(number(v), number(_mm512_srli_epi32(v, 16)));
      out[1] = pair(number(_mm512_srli_epi32(v, 8)), number(_mm512_srli_epi32(v, 24)));
    } else {
      pairs_of<B>(p, words, out);
    }
  }
};

// For a few rows of inputs 8-bit integers are 16 times their high nibble plus the low one, a product each: finding both
// in tables of 16 is cheaper than the whole in one of 256.
struct Nibbles : Bfloat16 {
  template <int B> static constexpr int SPLIT = B == 8 ? 2 : 1;
  struct Tables {
    Words words;
    __m512i low, high;
    explicit Tables(const Weight &w) : words(w) {
      uint16_t a[32], b[32];
      for (int i = 0; i < 32; i++) {
        a[i] = float_to_bf16((float)(i % 16));
        b[i] = float_to_bf16((float)(i % 16 * 16 - 128));
      }
      low = _mm512_loadu_si512(a);
      high = _mm512_loadu_si512(b);
    }
  };
  template <int B> INLINE void decode(const uint8_t *p, const Tables &tables, __m512i *out) {
    if constexpr (B == 8) {
      const __m512i v = raw(p);
      out[0] = _mm512_permutexvar_epi16(v, tables.low);
      out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), tables.high);
      out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), tables.low);
      out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), tables.high);
    } else {
      pairs_of<B>(p, tables.words, out);
    }
  }
};

// As ``dot`` of elementwise.h, of inputs that are bfloat16 themselves.
template <int M, int R> INLINE void dot(const PlainCall &c, int64_t row, int64_t n) {
  const uint16_t *x = c.x_half + row * c.k, *w = (const uint16_t *)c.w + n * c.k;
  __m512 acc[M][R];
  for (int m = 0; m < M; m++) for (int r = 0; r < R; r++) acc[m][r] = _mm512_setzero_ps();
  const int64_t step = 32 * R, whole = c.k / step * step;
  for (int64_t i = 0; i < whole; i += step)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const __m512bh v = (__m512bh)raw((const uint8_t *)(w + i + 32 * r));
#pragma GCC unroll 4
      for (int m = 0; m < M; m++)
        acc[m][r] = _mm512_dpbf16_ps(acc[m][r], (__m512bh)raw((const uint8_t *)(x + m * c.k + i + 32 * r)), v);
    }
  for (int64_t i = whole; i < c.k; i += 32) {
    const __mmask32 mask = c.k - i < 32 ? (1u << (c.k - i)) - 1 : ~0u;
    const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + i);
    for (int m = 0; m < M; m++)
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], (__m512bh)_mm512_maskz_loadu_epi16(mask, x + m * c.k + i), v);
  }
  for (int m = 0; m < M; m++) {
    __m512 sum = acc[m][0];
    for (int r = 1; r < R; r++) sum = _mm512_add_ps(sum, acc[m][r]);
    put(c, row + m, n, _mm512_reduce_add_ps(sum));
  }
}

void plain(const PlainCall &c, int64_t first, int64_t end) {
  for (int64_t n = first; n < end; n++)
    for (int64_t row = 0; row < c.m;) {
      const int64_t rows = c.m - row;
      if (rows >= 4) dot<4, 1>(c, row, n);
      else if (rows >= 2) dot<2, 2>(c, row, n);
      else dot<1, 4>(c, row, n);
      row += rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
    }
}

int bfloat16(const Call &call, int64_t threads) {
  return call.weight->is_integer ? Engine<Integers>::run<Nibbles>(call, threads) : Engine<Bfloat16>::run(call, threads);
}
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "steps.h"
namespace avx512_bf16 {
int bfloat16(const Call &call, int64_t threads) { return portable::float32(call, threads); }
void plain(const PlainCall &c, int64_t first, int64_t end) { portable::plain(c, first, end); }
}
#endif
