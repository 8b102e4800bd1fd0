// Float32 products for x86 processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#include <immintrin.h>
#include <cstring>
#include "attention.h"
#include "steps.h"
namespace avx512 {
#include "engine.h"
#include "inputs.h"
#include "avx512.h"
#include "plain.h"
#include "elementwise.h"
#include "attention_head.h"

template <bool TABLE> struct Float32 : Float32Input {
  using Vec = __m512;
  using Acc = __m512;
  static constexpr int MAX_M = 16, SUPER = 64, DIRECT = 4;
  template <int B> static constexpr int SPLIT = 1;
  template <int B> static constexpr bool has = !TABLE || B == 4 || B == 6 || B == 8;
  struct Tables {
    Words words;
    __m512 floats;  // of codes of up to 4 bits
    explicit Tables(const Weight &w) : words(w) {
      float first[LANES];
      for (int i = 0; i < LANES; i++) first[i] = w.table[i % (1 << w.bits)];
      floats = _mm512_loadu_ps(first);
    }
  };
  INLINE __m512 zero() { return _mm512_setzero_ps(); }
  INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  INLINE __m512 mac(__m512 acc, __m512 v, const uint32_t *x) {
    return _mm512_fmadd_ps(v, _mm512_set1_ps(load<float>(x)), acc);
  }
  INLINE V16 value(const Weight &, __m512 acc, float sum, const uint8_t *zero, int8_t, const int32_t *) {
    return float_value((V16)acc, sum, zero);
  }
  template <int B> INLINE void decode(const uint8_t *p, const Tables &tables, __m512 *out) {
    if constexpr (B == 4) {
      const __m512i v = raw(p);
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) out[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 8 * (i % 4) + 4 * (i / 4)), tables.floats);
    } else if constexpr (B == 2) {
      const __m512i v = raw(p);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) out[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 8 * (i % 4) + 2 * (i / 4)), tables.floats);
    } else if constexpr (TABLE) {
      __m512i pairs[chunk_k(B) / 2];
      pairs_of<B>(p, tables.words, pairs);
      const __m512i high = _mm512_set1_epi32((int)0xffff0000);
#pragma GCC unroll 8
      for (int j = 0; j < chunk_k(B) / 4; j++) {
        out[4 * j] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[2 * j], 16));
        out[4 * j + 1] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs[2 * j + 1], 16));
        out[4 * j + 2] = _mm512_castsi512_ps(_mm512_and_si512(pairs[2 * j], high));
        out[4 * j + 3] = _mm512_castsi512_ps(_mm512_and_si512(pairs[2 * j + 1], high));
      }
    } else {
      U16 bytes[chunk_k(B) / 4];
      byte_vectors<B>(p, bytes);
#pragma GCC unroll 8
      for (int j = 0; j < chunk_k(B) / 4; j++) {
        const __m512i v = _mm512_xor_si512((__m512i)bytes[j], _mm512_set1_epi8((char)(1 << (B - 1))));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {  // the sign is extended from the highest bit of the code
          const __m512i up = _mm512_slli_epi32(v, 32 - B - 8 * i);
          out[4 * j + i] = _mm512_cvtepi32_ps(_mm512_srai_epi32(up, 32 - B));
        }
      }
    }
  }
};

int float32(const Call &call, int64_t threads) {
  return call.weight->is_integer ? Engine<Float32<false>>::run(call, threads) : Engine<Float32<true>>::run(call, threads);
}
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
#include "attention.h"
#include "steps.h"
namespace avx512 {
int float32(const Call &call, int64_t threads) { return portable::float32(call, threads); }
void elementwise(const Step &s, const void *a, const void *b, void *out) { portable::elementwise(s, a, b, out); }
void plain(const PlainCall &c, int64_t first, int64_t end) { portable::plain(c, first, end); }
int attention(const Attention &a, int64_t head) { return portable::attention(a, head); }
}
#endif
