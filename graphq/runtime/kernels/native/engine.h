// The one matrix kernel. A policy P says what a decoded vector is and how it is multiplied; ``Engine<P>`` walks over
// tiles, groups and chunks, decodes, and applies scales. Included by each translation unit, in its own namespace.
//
// P::Vec        16 rows by UNIT_K codes, decoded          P::Acc    16 sums of products
// P::UNIT_K     codes of a row in a Vec: 1, 2 or 4        P::Sum    float or int32_t: the sum of a group's inputs
// P::MAX_M      input rows that are multiplied at once
// P::SPLIT<B>   Vecs that share an input (parts of codes that are no single number of the product's type)
// P::SUPER      input rows that share a decoded panel: their inputs stay in a core's own cache
// P::DIRECT     up to so many input rows are multiplied while codes are decoded, more by panels of decoded codes
// P::FUSED<B>   whether the first block of rows is multiplied while codes are decoded
// P::has<B>     whether there are such codes; others are not asked for
// P::decode<B>  the Vecs of a chunk, in the order in which ``pack_row`` puts inputs




typedef float V16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t I16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t U16 __attribute__((vector_size(64), aligned(4)));

#define INLINE static inline __attribute__((always_inline))

template <class T> INLINE T load(const void *p) { T v; std::memcpy(&v, p, sizeof v); return v; }
INLINE V16 splat(float v) { return V16{} + v; }

INLINE float bf16_to_float(uint16_t bits) { uint32_t u = (uint32_t)bits << 16; float f; std::memcpy(&f, &u, 4); return f; }
INLINE uint16_t float_to_bf16(float f) {  // to nearest, halves to even; a NaN stays one
  uint32_t u; std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)((u >> 16) | 0x40);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// float32 of 16 scales of a byte each
INLINE V16 scales_of(const uint8_t *p, int32_t kind) {
  if (kind == SCALE_F32) return load<V16>(p);
  U16 v;
  for (int i = 0; i < LANES; i++) v[i] = p[i];
  U16 bits;
  if (kind == SCALE_E8M0) {  // 2^(b - 127); 0 is 2^-127, a subnormal number, and 255 NaN
    bits = v << 23;
    for (int i = 0; i < LANES; i++) if (p[i] == 0) bits[i] = 0x00400000; else if (p[i] == 255) bits[i] = 0x7fc00000;
    V16 f; std::memcpy(&f, &bits, sizeof f);
    return f;
  }
  bits = ((v & 0x80) << 24) | ((v & 0x7f) << 20);  // e4m3 with float32's exponent, off by 120
  V16 f; std::memcpy(&f, &bits, sizeof f);
  f = f * 0x1p120f;
  for (int i = 0; i < LANES; i++) if ((p[i] & 0x7f) == 0x7f) f[i] = __builtin_nanf("");
  return f;
}

INLINE int block_of(int64_t rows, int most) {  // how many rows the next block takes
  if (rows >= most) return most;
  int b = 1;
  while (b * 2 <= rows) b *= 2;
  return b;
}

template <class P> struct Engine {
  using Vec = typename P::Vec;
  using Acc = typename P::Acc;
  using Sum = typename P::Sum;
  static constexpr int DIRECT = P::DIRECT;
  static constexpr int SUPER = P::SUPER;
  static constexpr int PANEL = 128;      // Vecs of a panel: 8 KB
  static constexpr int UNITS_OF_4 = 4 / P::UNIT_K;

  struct Job {
    const Call *call;
    const uint32_t *x;  // by blocks of rows: [units][rows of the block]
    const Sum *sums;    // [m][groups]
    int64_t units;      // of a row
  };

  static int rows_of(int64_t m, int64_t left) { return m <= DIRECT ? (int)m : block_of(left, P::MAX_M); }

  // -- inputs --
  template <class T> static void pack_row(const Call &call, const Grid &grid, const T *row, uint32_t *to, int stride,
                                          Sum *sums, uint8_t *line_memory) {
    const Weight &w = *call.weight;
    typename P::Input *line = (typename P::Input *)line_memory;
    const int64_t width = chunk_k(w.bits);
    for (int64_t g = 0; g < grid.groups; g++) {
      const int64_t size = g + 1 < grid.groups ? w.group : grid.last;
      const int64_t padded = (size + width - 1) / width * width;
      const T *from = row + g * w.group;
      Sum sum = 0;
      for (int64_t i = 0; i < size; i++) { line[i] = P::input(from[i]); sum += P::number(line[i]); }
      for (int64_t i = size; i < padded; i++) line[i] = 0;
      sums[g] = sum;
      for (int64_t i = 0; i < padded; i += 4)
        for (int u = 0; u < UNITS_OF_4; u++, to += stride) *to = P::unit(line + i, u);
    }
  }

  static void pack_rows(const Call &call, const Grid &grid, int64_t units, uint32_t *x, Sum *sums, uint8_t *line) {
    const Weight &w = *call.weight;
    for (int64_t r = 0; r < call.m;) {
      const int rows = rows_of(call.m, call.m - r);
      for (int i = 0; i < rows; i++) {
        uint32_t *to = x + r * units + i;
        Sum *own = sums + (r + i) * grid.groups;
        const int64_t at = (r + i) * w.k;
        if (call.x_type == FLOAT32) pack_row(call, grid, (const float *)call.x + at, to, rows, own, line);
        else if (call.x_type == BFLOAT16) pack_row(call, grid, (const uint16_t *)call.x + at, to, rows, own, line);
        else pack_row(call, grid, (const int8_t *)call.x + at, to, rows, own, line);
      }
      r += rows;
    }
  }

  // -- groups' ends --
  INLINE V16 valued(const Weight &w, const Job &job, Acc acc, int64_t row, int64_t g, int64_t groups, const uint8_t *zero,
                    const int32_t *sums) {
    return P::value(w, acc, job.sums[row * groups + g], zero, job.call->x_zero ? job.call->x_zero[row] : 0, sums);
  }

  static void store(const Call &call, int64_t tile, int64_t row, V16 y) {
    const Weight &w = *call.weight;
    const int64_t n0 = tile * LANES, left = w.n - n0, count = left < LANES ? left : LANES;
    float out[LANES], factor[LANES], bias[LANES];
    std::memcpy(out, &y, sizeof out);
    if (call.x_scale) for (int i = 0; i < LANES; i++) out[i] *= call.x_scale[row];
    if (w.row_scale) {
      std::memcpy(factor, w.row_scale + n0, count * 4);
      for (int64_t i = 0; i < count; i++) out[i] *= factor[i];
    }
    if (w.bias) {
      std::memcpy(bias, w.bias + n0, count * 4);
      for (int64_t i = 0; i < count; i++) out[i] += bias[i];
    }
    if (call.y_type == FLOAT32) {
      std::memcpy((float *)call.y + row * w.n + n0, out, count * 4);
    } else {
      uint16_t half[LANES];
      for (int i = 0; i < LANES; i++) half[i] = float_to_bf16(out[i]);
      std::memcpy((uint16_t *)call.y + row * w.n + n0, half, count * 2);
    }
  }

  // -- a few rows: codes are decoded in registers --
  // Tiles are one stream, which the processor fetches ahead by itself: prefetches gained nothing.
  template <int B, int M> static void direct(const Job &job, const Grid &grid, const typename P::Tables &shared,
                                             int64_t tile) {
    const typename P::Tables tables(shared);  // its own, which stay in registers
    constexpr int CHUNK = chunk_k(B) / P::UNIT_K, R = M == 1 ? 4 : M == 2 ? 2 : 1, S = P::template SPLIT<B>;
    const Weight &w = *job.call->weight;
    const uint8_t *p = w.tiles + tile * grid.tile_bytes;
    const uint32_t *x = job.x;
    V16 y[M];
    for (int m = 0; m < M; m++) y[m] = V16{};
    for (int64_t g = 0; g < grid.groups; g++) {
      const int64_t chunks = g + 1 < grid.groups ? grid.chunks : grid.last_chunks;
      Acc acc[M][R];
#pragma GCC unroll 4
      for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) acc[m][r] = P::zero();
      for (int64_t c = 0; c < chunks; c++, p += chunk_bytes(B), x += CHUNK * M) {
        Vec v[CHUNK * S];
        P::template decode<B>(p, tables, v);
#pragma GCC unroll 64
        for (int u = 0; u < CHUNK * S; u++)
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) acc[m][u % R] = P::mac(acc[m][u % R], v[u], x + (u / S) * M + m);
      }
      const V16 scale = scales_of(p, w.scale);
      p += w.scale == SCALE_F32 ? 64 : 16;
      const int32_t *sums = w.sums ? w.sums + (tile * grid.groups + g) * LANES : nullptr;
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) {
        Acc a = acc[m][0];
#pragma GCC unroll 4
        for (int r = 1; r < R; r++) a = P::add(a, acc[m][r]);
        y[m] += scale * valued(w, job, a, m, g, grid.groups, w.has_zero ? p : nullptr, sums);
      }
      p += w.has_zero ? 16 : 0;
    }
    for (int m = 0; m < M; m++) store(*job.call, tile, m, y[m]);
  }

  // -- many rows: a panel of decoded codes is multiplied by blocks of rows --
  struct End {  // of a group: where its sums go
    V16 scale;
    const uint8_t *zero;
    const int32_t *sums;
    int64_t group, groups;
  };

  template <int MB> INLINE void block(const Vec *panel, int64_t units, const uint32_t *x, Acc *part, bool begins,
                                      const Job &job, int64_t row, V16 *y, const End *end) {
    Acc a[MB];
#pragma GCC unroll 16
    for (int m = 0; m < MB; m++) a[m] = begins ? P::zero() : part[m];
    for (int64_t u = 0; u < units; u++, x += MB) {
      const Vec v = panel[u];
#pragma GCC unroll 16
      for (int m = 0; m < MB; m++) a[m] = P::mac(a[m], v, x + m);
    }
    if (end) {
#pragma GCC unroll 16
      for (int m = 0; m < MB; m++)
        y[m] += end->scale * valued(*job.call->weight, job, a[m], row + m, end->group, end->groups, end->zero, end->sums);
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < MB; m++) part[m] = a[m];
    }
  }

  // As ``block``, of units whose codes are decoded on the way, where products leave room for it. The panel is for the blocks
  // behind it.
  template <int B, int MB> INLINE void first_block(const uint8_t *p, int64_t chunks, const typename P::Tables &shared,
                                                   Vec *panel, bool keeps, const uint32_t *x, Acc *part, bool begins,
                                                   const Job &job, int64_t row, V16 *y, const End *end) {
    constexpr int CHUNK = chunk_k(B) / P::UNIT_K;
    const typename P::Tables tables(shared);
    Acc a[MB];
#pragma GCC unroll 16
    for (int m = 0; m < MB; m++) a[m] = begins ? P::zero() : part[m];
    for (int64_t c = 0; c < chunks; c++, p += chunk_bytes(B), panel += CHUNK) {
      Vec v[CHUNK];
      P::template decode<B>(p, tables, v);
#pragma GCC unroll 16
      for (int u = 0; u < CHUNK; u++, x += MB) {
        if (keeps) panel[u] = v[u];
#pragma GCC unroll 16
        for (int m = 0; m < MB; m++) a[m] = P::mac(a[m], v[u], x + m);
      }
    }
    if (end) {
#pragma GCC unroll 16
      for (int m = 0; m < MB; m++)
        y[m] += end->scale * valued(*job.call->weight, job, a[m], row + m, end->group, end->groups, end->zero, end->sums);
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < MB; m++) part[m] = a[m];
    }
  }

  // ``part``: sums of groups that are longer than a panel; ``end``: null while a group goes on.
  static void blocks(const Vec *panel, int64_t units, int64_t first_unit, const Job &job, int64_t r0, int64_t rows,
                     Acc *part, bool begins, V16 *y, const End *end) {
    for (int64_t r = r0; r < r0 + rows;) {
      const int count = rows_of(job.call->m, job.call->m - r);
      const uint32_t *x = job.x + r * job.units + first_unit * count;
      Acc *own = part + (r - r0);
      V16 *to = y + (r - r0);
      switch (count) {
        case 16: if constexpr (P::MAX_M >= 16) block<16>(panel, units, x, own, begins, job, r, to, end); break;
        case 8: if constexpr (P::MAX_M >= 8) block<8>(panel, units, x, own, begins, job, r, to, end); break;
        case 4: block<4>(panel, units, x, own, begins, job, r, to, end); break;
        case 2: block<2>(panel, units, x, own, begins, job, r, to, end); break;
        default: block<1>(panel, units, x, own, begins, job, r, to, end); break;
      }
      r += count;
    }
  }

  template <int B> static void paneled(const Job &job, const Grid &grid, const typename P::Tables &tables, int64_t tile,
                                       int64_t r0, int64_t rows) {
    constexpr int CHUNK = chunk_k(B) / P::UNIT_K, STEP = PANEL / CHUNK;
    static_assert(P::template SPLIT<B> == 1, "panels hold whole codes");
    const Weight &w = *job.call->weight;
    alignas(64) Vec panel[PANEL];
    alignas(64) Acc part[SUPER];
    alignas(64) V16 y[SUPER];
    for (int64_t r = 0; r < rows; r++) y[r] = V16{};
    const uint8_t *p = w.tiles + tile * grid.tile_bytes;
    int64_t unit = 0;
    for (int64_t g = 0; g < grid.groups; g++) {
      const int64_t chunks = g + 1 < grid.groups ? grid.chunks : grid.last_chunks;
      for (int64_t c = 0; c < chunks; c += STEP) {
        const int64_t count = chunks - c < STEP ? chunks - c : STEP;
        const bool is_first = P::template FUSED<B> && rows_of(job.call->m, job.call->m - r0) == 16;
        const uint8_t *codes = p;
        if (is_first) p += count * chunk_bytes(B);
        else for (int64_t i = 0; i < count; i++, p += chunk_bytes(B)) {
          for (int j = 0; j < chunk_bytes(B); j += 64) __builtin_prefetch(p + STEP * chunk_bytes(B) + j);  // the next panel
          P::template decode<B>(p, tables, panel + i * CHUNK);
        }
        const bool ends = c + count == chunks;
        const int64_t beside = w.scale == SCALE_F32 ? 64 : 16;
        End end;
        if (ends)
          end = End{scales_of(p, w.scale), w.has_zero ? p + beside : nullptr,
                    w.sums ? w.sums + (tile * grid.groups + g) * LANES : nullptr, g, grid.groups};
        const int64_t done = is_first ? 16 : 0;
        if constexpr (P::template FUSED<B>) if (is_first)
          first_block<B, 16>(codes, count, tables, panel, rows > 16, job.x + r0 * job.units + unit * 16, part, c == 0, job,
                             r0, y, ends ? &end : nullptr);
        blocks(panel, count * CHUNK, unit, job, r0 + done, rows - done, part + done, c == 0, y + done, ends ? &end : nullptr);
        unit += count * CHUNK;
        if (ends) p += beside + (w.has_zero ? 16 : 0);
      }
    }
    for (int64_t r = 0; r < rows; r++) store(*job.call, tile, r0 + r, y[r]);
  }

  template <class Few, int B> static void part(void *data, int64_t index, int64_t parts) {
    const Job &job = *(const Job *)data;
    const Grid grid(*job.call->weight);
    const int64_t first = grid.tiles * index / parts, end = grid.tiles * (index + 1) / parts, m = job.call->m;
    if constexpr (DIRECT > 0) if (m <= DIRECT) {
      const typename Engine<Few>::Job few{job.call, job.x, (const typename Few::Sum *)job.sums, job.units};
      const typename Few::Tables tables(*job.call->weight);
      for (int64_t tile = first; tile < end; tile++) switch (m) {
        case 1: Engine<Few>::template direct<B, 1>(few, grid, tables, tile); break;
        case 2: Engine<Few>::template direct<B, 2>(few, grid, tables, tile); break;
        case 3: Engine<Few>::template direct<B, 3>(few, grid, tables, tile); break;
        default: Engine<Few>::template direct<B, 4>(few, grid, tables, tile); break;
      }
      return;
    }
    const typename P::Tables tables(*job.call->weight);
    for (int64_t r = 0; r < m; r += SUPER)
      for (int64_t tile = first; tile < end; tile++)
        paneled<B>(job, grid, tables, tile, r, m - r < SUPER ? m - r : SUPER);
  }

  template <class Few, int B> static void start(Job &job, int64_t threads) {
    if constexpr (P::template has<B>) in_parallel(part<Few, B>, &job, threads);
  }

  // ``Few``: the policy of products with a few rows, with the same inputs.
  template <class Few = P> static int run(const Call &call, int64_t threads) {
    const Weight &w = *call.weight;
    const Grid grid(w);
    const int64_t width = chunk_k(w.bits);
    const int64_t units = ((grid.groups - 1) * grid.chunks + grid.last_chunks) * width / P::UNIT_K;
    const int64_t line = (grid.chunks * width * 4 + 63) / 64 * 64, inputs = (call.m * units * 4 + 63) / 64 * 64;
    uint8_t *memory = (uint8_t *)scratch_alloc(line + inputs + call.m * grid.groups * 4);
    if (!memory) return 1;
    uint32_t *x = (uint32_t *)(memory + line);
    Sum *sums = (Sum *)(memory + line + inputs);
    pack_rows(call, grid, units, x, sums, memory);
    Job job{&call, x, sums, units};
    switch (w.bits) {
      case 2: start<Few, 2>(job, threads); break;
      case 3: start<Few, 3>(job, threads); break;
      case 4: start<Few, 4>(job, threads); break;
      case 5: start<Few, 5>(job, threads); break;
      case 6: start<Few, 6>(job, threads); break;
      case 7: start<Few, 7>(job, threads); break;
      default: start<Few, 8>(job, threads); break;
    }
    scratch_free(memory);
    return 0;
  }
};
