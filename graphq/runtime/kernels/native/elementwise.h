// Steps of float32 and bfloat16 numbers, in blocks that become float32. Included in a namespace's file.

constexpr int64_t BLOCK = 256;

INLINE void load_block(const void *p, int32_t type, int64_t at, int64_t count, float *to) {
  if (type == FLOAT32) std::memcpy(to, (const float *)p + at, count * 4);
  else for (int64_t i = 0; i < count; i++) to[i] = bf16_to_float(((const uint16_t *)p)[at + i]);
}
INLINE void store_block(void *p, int32_t type, int64_t at, int64_t count, const float *from) {
  if (type == FLOAT32) std::memcpy((float *)p + at, from, count * 4);
  else for (int64_t i = 0; i < count; i++) ((uint16_t *)p)[at + i] = float_to_bf16(from[i]);
}

// e^x to 1 ulp or so: 2^n e^r with |r| <= ln(2)/2, and the Taylor polynomial of degree 7. A NaN stays one.
INLINE float exp_of(float x) {
  x = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;  // 0 and infinity from there on
  const float n = __builtin_rintf(x * 0x1.715476p+0f);
  const float r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  float p = 0x1.a01a02p-13f;
  p = p * r + 0x1.6c16c2p-10f;
  p = p * r + 0x1.111112p-7f;
  p = p * r + 0x1.555556p-5f;
  p = p * r + 0x1.555556p-3f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t whole = (int32_t)(n == n ? n : 0.0f), half = whole / 2;  // 2^n itself may be out of range
  const uint32_t a = (uint32_t)(half + 127) << 23, b = (uint32_t)(whole - half + 127) << 23;
  return p * load<float>(&a) * load<float>(&b);
}

template <class F> INLINE void each(float *v, int64_t count, F f) { for (int64_t i = 0; i < count; i++) v[i] = f(v[i]); }
template <class F> INLINE void both(float *v, const float *w, bool is_one, int64_t count, F f) {
  if (is_one) for (int64_t i = 0; i < count; i++) v[i] = f(v[i], w[0]);
  else for (int64_t i = 0; i < count; i++) v[i] = f(v[i], w[i]);
}

static void apply(int32_t op, float *v, const float *w, bool is_one, int64_t n) {
  switch (op) {
    case STEP_ADD: both(v, w, is_one, n, [](float a, float b) { return a + b; }); break;
    case STEP_SUB: both(v, w, is_one, n, [](float a, float b) { return a - b; }); break;
    case STEP_MUL: both(v, w, is_one, n, [](float a, float b) { return a * b; }); break;
    case STEP_SQUARE: each(v, n, [](float a) { return a * a; }); break;
    case STEP_RSQRT: each(v, n, [](float a) { return 1.0f / __builtin_sqrtf(a); }); break;
    case STEP_NEG: each(v, n, [](float a) { return -a; }); break;
    case STEP_RELU: each(v, n, [](float a) { return a < 0 ? 0 : a; }); break;
    case STEP_SIGMOID: each(v, n, [](float a) { return 1.0f / (1.0f + exp_of(-a)); }); break;
    case STEP_SILU: each(v, n, [](float a) { return a / (1.0f + exp_of(-a)); }); break;
    case STEP_GELU_TANH:
      each(v, n, [](float a) {
        const float u = 0x1.988454p-1f * (a + 0x1.6e4e26p-5f * a * a * a);  // sqrt(2 / pi), 0.044715
        return a - a / (1.0f + exp_of(2.0f * u));
      });
      break;
    default: break;
  }
}

static void means(const Step &s, const void *a, void *out) {
  alignas(64) float v[BLOCK];
  for (int64_t row = 0; row < s.n0; row++) {
    V16 sum{};
    float rest = 0;
    for (int64_t k = 0; k < s.n2; k += BLOCK) {
      const int64_t count = s.n2 - k < BLOCK ? s.n2 - k : BLOCK;
      load_block(a, s.a_type, row * s.n2 + k, count, v);
      int64_t i = 0;
      for (; i + LANES <= count; i += LANES) sum += load<V16>(v + i);
      for (; i < count; i++) rest += v[i];
    }
    for (int width = LANES / 2; width; width /= 2)
      for (int i = 0; i < width; i++) sum[i] += sum[i + width];
    const float mean = (sum[0] + rest) / (float)s.n2;
    store_block(out, s.out_type, row, 1, &mean);
  }
}

static void roll(const Step &s, const void *a, void *out) {
  const int64_t size = s.a_type == FLOAT32 ? 4 : 2, width = s.n2 * size, by = s.modulus * size;
  for (int64_t row = 0; row < s.n0; row++) {
    const uint8_t *from = (const uint8_t *)a + row * width;
    uint8_t *to = (uint8_t *)out + row * width;
    std::memcpy(to + by, from, width - by);
    std::memcpy(to, from + width - by, by);
  }
}

void elementwise(const Step &s, const void *a, const void *b, void *out) {
  if (s.op == STEP_MEAN) return means(s, a, out);
  if (s.op == STEP_ROLL) return roll(s, a, out);
  alignas(64) float v[BLOCK], w[BLOCK];
  const bool has_two = s.op <= STEP_MUL, is_one = !b || !s.t2;
  w[0] = (float)s.number;
  for (int64_t i = 0; i < s.n0; i++)
    for (int64_t j = 0; j < s.n1; j++) {
      const int64_t at = (i * s.n1 + j) * s.n2, other = i % s.modulus * s.t0 + j * s.t1;
      if (has_two && b && is_one) load_block(b, s.b_type, other, 1, w);
      for (int64_t k = 0; k < s.n2; k += BLOCK) {
        const int64_t count = s.n2 - k < BLOCK ? s.n2 - k : BLOCK;
        load_block(a, s.a_type, at + k, count, v);
        if (has_two && !is_one) load_block(b, s.b_type, other + k, count, w);
        apply(s.op, v, w, is_one, count);
        store_block(out, s.out_type, at + k, count, v);
      }
    }
}

// -- linears with weights as they are --
typedef uint16_t H16 __attribute__((vector_size(32), aligned(2)));

INLINE V16 numbers(const float *p) { return load<V16>(p); }
INLINE V16 numbers(const uint16_t *p) {
  const U16 u = __builtin_convertvector(load<H16>(p), U16) << 16;
  V16 f;
  std::memcpy(&f, &u, sizeof f);
  return f;
}
INLINE float number(float v) { return v; }
INLINE float number(uint16_t v) { return bf16_to_float(v); }

// ``N`` outputs of ``M`` rows. For few rows weights are one stream, N = 1, which a core reads at twice the rate of four, or
// of one that is fetched ahead of time. ``R`` vectors of each row are summed apart: sums do not wait for each other.
template <int M, int N, int R, class T> INLINE void dots(const PlainCall &c, const T *w, int64_t row, int64_t n) {
  V16 acc[M][N][R];
  for (int m = 0; m < M; m++) for (int j = 0; j < N; j++) for (int r = 0; r < R; r++) acc[m][j][r] = V16{};
  const int64_t step = LANES * R, whole = c.k / step * step;
  const float *x = c.x + row * c.k;
  w += n * c.k;
  for (int64_t i = 0; i < whole; i += step)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      V16 v[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) v[j] = numbers(w + j * c.k + i + r * LANES);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        const V16 u = load<V16>(x + m * c.k + i + r * LANES);
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) acc[m][j][r] += u * v[j];
      }
    }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < N; j++) {
      V16 sum = acc[m][j][0];
      for (int r = 1; r < R; r++) sum += acc[m][j][r];
      for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) sum[i] += sum[i + width];
      float total = sum[0];
      for (int64_t i = whole; i < c.k; i++) total += x[m * c.k + i] * number(w[j * c.k + i]);
      put(c, row + m, n + j, total);
    }
}

template <int N, class T> static void plain_of(const PlainCall &c, int64_t n) {
  const T *w = (const T *)c.w;
  for (int64_t row = 0; row < c.m;) {  // whose weights stay in the first cache meanwhile
    const int64_t rows = c.m - row;
    if (rows >= 4) dots<4, N, 1>(c, w, row, n);
    else if (rows >= 2) dots<2, N, 2>(c, w, row, n);
    else dots<1, N, 4>(c, w, row, n);
    row += rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
  }
}

template <class T> static void plain_of(const PlainCall &c, int64_t first, int64_t end) {
  for (int64_t n = first; n < end;)
    if (c.m >= 8 && end - n >= 4) plain_of<4, T>(c, n), n += 4;
    else plain_of<1, T>(c, n), n++;
}

void plain(const PlainCall &c, int64_t first, int64_t end) {
  if (c.w_type == FLOAT32) plain_of<float>(c, first, end);
  else plain_of<uint16_t>(c, first, end);
}
