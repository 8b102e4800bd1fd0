// Scales and int8 codes of rows of activations: bit for bit what graphq.numerics gives, in one pass over each row.
// Included in a namespace's file behind inputs.h.

#ifdef GENERIC_AVX2
INLINE __m256 eight(const float *x) { return _mm256_loadu_ps(x); }
INLINE __m256 eight(const uint16_t *x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)x)), 16));
}

// The extremes of ``count`` numbers, a multiple of 8, and a sum that is not 0 where one of them is not finite.
template <class T> static void extremes(const T *x, int64_t count, float *low, float *high, float *odd) {
  __m256 least = _mm256_set1_ps(*low), most = _mm256_set1_ps(*high), sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 v = eight(x + i);
    least = _mm256_min_ps(v, least);
    most = _mm256_max_ps(v, most);
    sum = _mm256_add_ps(sum, _mm256_mul_ps(v, _mm256_setzero_ps()));
  }
  float a[8], b[8], c[8];
  _mm256_storeu_ps(a, least);
  _mm256_storeu_ps(b, most);
  _mm256_storeu_ps(c, sum);
  for (int l = 0; l < 8; l++) {
    *low = a[l] < *low ? a[l] : *low;
    *high = b[l] > *high ? b[l] : *high;
    *odd += c[l];
  }
}

// clamp(round(x / scale + before) + after) of ``count`` numbers, a multiple of 32; halves go to even.
template <class T> static void codes_of(const T *x, int64_t count, float scale, float before, float after, int8_t *codes) {
  const __m256 by = _mm256_set1_ps(scale), first = _mm256_set1_ps(before), then = _mm256_set1_ps(after);
  const __m256 top = _mm256_set1_ps(127), bottom = _mm256_set1_ps(-128);
  for (int64_t i = 0; i < count; i += 32) {
    __m256i four[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      __m256 v = _mm256_add_ps(_mm256_div_ps(eight(x + i + 8 * j), by), first);
      v = _mm256_add_ps(_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), then);
      four[j] = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(v, top), bottom));
    }
    const __m256i a = _mm256_packs_epi32(four[0], four[1]), b = _mm256_packs_epi32(four[2], four[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs works in halves
    _mm256_storeu_si256((__m256i *)(codes + i), _mm256_permutevar8x32_epi32(_mm256_packs_epi16(a, b), order));
  }
}
constexpr int64_t AT_ONCE = 32;
#else
template <class T> static void extremes(const T *x, int64_t count, float *low, float *high, float *odd) {
  for (int64_t i = 0; i < count; i++) {
    const float v = Float32Input::input(x[i]);
    *low = v < *low ? v : *low;
    *high = v > *high ? v : *high;
    *odd += v * 0.0f;
  }
}
template <class T> static void codes_of(const T *x, int64_t count, float scale, float before, float after, int8_t *codes) {
  for (int64_t i = 0; i < count; i++) {
    const float v = __builtin_rintf(Float32Input::input(x[i]) / scale + before) + after;
    codes[i] = (int8_t)(v > 127 ? 127 : v < -128 ? -128 : v);
  }
}
constexpr int64_t AT_ONCE = 1;
#endif

template <class T> static int quantize_row(const Quantizing &q, const T *x, int64_t row) {
  const int64_t k = q.k, whole = k / AT_ONCE * AT_ONCE;
  float low = 0, high = 0, odd = 0;
  if (k) {
    low = high = Float32Input::input(x[0]);
    extremes(x, whole, &low, &high, &odd);
    for (int64_t i = whole; i < k; i++) {
      const float v = Float32Input::input(x[i]);
      low = v < low ? v : low;
      high = v > high ? v : high;
      odd += v * 0.0f;  // NaN from what is not finite on
    }
    if (!(odd == 0.0f)) return 1;
  }
  const float tiny = 0x1p-126f;
  float scale, zero = 0;
  if (q.rule >= RULE_ASYMMETRIC) {
    low = low < 0 ? low : 0;
    high = high > 0 ? high : 0;
    const float span = high - low;
    scale = __builtin_isinf(span) ? high / 255.0f - low / 255.0f : span / 255.0f;
    scale = span == 0 ? 1 : scale < tiny ? tiny : scale;
    zero = __builtin_rintf(-128.0f - low / scale);
    zero = zero < -128 ? -128 : zero > 127 ? 127 : zero;
  } else {
    const float a = __builtin_fabsf(low), b = __builtin_fabsf(high), extreme = a > b ? a : b;
    const float divisor = q.rule == RULE_HALF ? 127.5f : q.rule == RULE_BY_SIGN && b < a ? 128.0f : 127.0f;
    scale = extreme / divisor;
    if (q.rule == RULE_BY_SIGN) scale = scale < 0x1p-23f ? 1 : scale;
    else scale = extreme == 0 ? 1 : scale < tiny ? tiny : scale;
  }
  q.scale[row] = scale;
  q.zero[row] = (int8_t)zero;
  const float before = q.rule == RULE_JOINT ? zero : 0, after = q.rule == RULE_JOINT ? 0 : zero;
  int8_t *codes = q.codes + row * k;
  codes_of(x, whole, scale, before, after, codes);
  for (int64_t i = whole; i < k; i++) {
    float v = __builtin_rintf(Float32Input::input(x[i]) / scale + before) + after;
    v = v > 127 ? 127 : v < -128 ? -128 : v;
    codes[i] = (int8_t)v;
  }
  return 0;
}

int quantize(const Quantizing &q, int64_t row) {
  return q.x_type == FLOAT32 ? quantize_row(q, (const float *)q.x + row * q.k, row)
                             : quantize_row(q, (const uint16_t *)q.x + row * q.k, row);
}
