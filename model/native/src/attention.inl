// Attention over the paged cache. A query attends to its keys in the order of their positions, in splits
// of SPLIT positions that begin at multiples of SPLIT; each split gives (largest, sum, values), and
// these are merged in order. The arithmetic of a query depends on nothing else, so neither the other
// queries of a tile nor the distribution of splits over threads can change a bit. Cost is linear in the
// context.

QUIRE_INLINE Lanes widen(const uint16_t* p) { return from_bf16(p); }
QUIRE_INLINE Lanes widen(const int8_t* p) { return from_int8(p); }

// Queries of one walk over the keys; and how many groups of keys, and LANES of values, these take at once:
// enough sums to hide the latency of `fma`, and no more than there are registers.
#if defined(__AVX512F__)
constexpr int QUERIES = 4, GROUPS_TOGETHER = 4;
constexpr int values_together(int) { return 4; }
#else
constexpr int QUERIES = 6, GROUPS_TOGETHER = 1;  // sums of two registers each
constexpr int values_together(int queries) { return queries <= 2 ? 4 : 1; }
#endif

// The state of one walk over the keys of a split, by up to QUERIES queries.
struct Walk {
  const AttentionItem* item;
  const float* queries[QUERIES];
  int low[QUERIES], high[QUERIES];  // positions that each query sees: low <= p < high
  int begin, end;                   // of the walk; begin is a multiple of GROUP
  bool is_first;                    // of the walks over these keys: the later ones find them in a cache
  float weights[QUERIES][SPLIT];    // scores, then weights; index: position - begin
};

static uint8_t* region_at(const AttentionItem& item, int position) {
  const HeadShape& shape = *item.shape;
  const size_t block = (size_t)item.blocks[position / shape.block_size];
  return item.pool.base + block * item.pool.block_bytes + (size_t)item.head * item.pool.region_bytes;
}

template <typename Cell> QUIRE_INLINE const Cell* keys_at(const AttentionItem& item, int position) {
  const int offset = position % item.shape->block_size;
  return (const Cell*)region_at(item, position) + (size_t)offset * item.shape->dim;
}

template <typename Cell> QUIRE_INLINE const Cell* values_at(const AttentionItem& item, int position) {
  const HeadShape& shape = *item.shape;
  const int offset = position % shape.block_size;
  return (const Cell*)region_at(item, position) + (size_t)(shape.block_size + offset) * shape.dim;
}

// Scales lie behind the cells of an 8-bit region; which: 0 keys, 1 values.
static const float* scales_at(const AttentionItem& item, int position, int which) {
  const HeadShape& shape = *item.shape;
  const size_t cells = (size_t)shape.block_size * shape.dim;
  const float* scales = (const float*)(region_at(item, position) + 2 * cells);
  return scales + which * shape.block_size + position % shape.block_size;
}

template <typename Cell, int COUNT, int WIDTH> static void score_groups(Walk& walk, int position) {
  const AttentionItem& item = *walk.item;
  const int dim = item.shape->dim;
  const Cell* keys[WIDTH];
  Lanes sums[COUNT][WIDTH];
  QUIRE_UNROLL
  for (int g = 0; g < WIDTH; g++) keys[g] = keys_at<Cell>(item, position + g * GROUP);
  QUIRE_UNROLL
  for (int q = 0; q < COUNT; q++)
    QUIRE_UNROLL
    for (int g = 0; g < WIDTH; g++) sums[q][g] = splat(0.0f);
  // Blocks lie far apart, so the hardware does not prefetch them. Values are prefetched while their keys
  // are scored, and so are the keys of the next groups.
  const char* ahead[2 * WIDTH];
  int fetched = 0;
  if (walk.is_first)
    for (int g = 0; g < WIDTH; g++) {
      const int now = position + g * GROUP, next = now + WIDTH * GROUP;
      ahead[fetched++] = (const char*)values_at<Cell>(item, now);
      if (next < walk.end) ahead[fetched++] = (const char*)keys_at<Cell>(item, next);
    }
  for (int d = 0; d < dim; d++) {
    constexpr int lines_apart = 64 / (GROUP * (int)sizeof(Cell));  // steps of d per cache line
    if (d % lines_apart == 0)
      for (int i = 0; i < fetched; i++) __builtin_prefetch(ahead[i] + (size_t)d * GROUP * sizeof(Cell));
    Lanes k[WIDTH];
    QUIRE_UNROLL
    for (int g = 0; g < WIDTH; g++) k[g] = widen(keys[g] + d * GROUP);
    QUIRE_UNROLL
    for (int q = 0; q < COUNT; q++) {
      const Lanes x = splat(walk.queries[q][d]);
      QUIRE_UNROLL
      for (int g = 0; g < WIDTH; g++) sums[q][g] = fma(x, k[g], sums[q][g]);
    }
  }
  QUIRE_UNROLL
  for (int g = 0; g < WIDTH; g++) {
    const int at = position + g * GROUP;
    Lanes scale = splat(1.0f);
    if constexpr (sizeof(Cell) == 1) scale = load(scales_at(item, at, 0));
    QUIRE_UNROLL
    for (int q = 0; q < COUNT; q++) {
      const Lanes s = sizeof(Cell) == 1 ? sums[q][g] * scale : sums[q][g];
      store(walk.weights[q] + (at - walk.begin), s);
    }
  }
}

template <typename Cell, int COUNT> static void score(Walk& walk) {
  int position = walk.begin;
  for (; position + (GROUPS_TOGETHER - 1) * GROUP < walk.end; position += GROUPS_TOGETHER * GROUP)
    score_groups<Cell, COUNT, GROUPS_TOGETHER>(walk, position);
  if constexpr (GROUPS_TOGETHER == 4) switch ((walk.end - position + GROUP - 1) / GROUP) {
    case 3: return score_groups<Cell, COUNT, 3>(walk, position);
    case 2: return score_groups<Cell, COUNT, 2>(walk, position);
    default: break;
  }
  for (; position < walk.end; position += GROUP) score_groups<Cell, COUNT, 1>(walk, position);
}

// Keeps the lanes of a group that a query sees.
QUIRE_INLINE Lanes seen(const Walk& walk, int q, int position, Lanes s, Lanes otherwise) {
  const int from = walk.low[q] - position, to = walk.high[q] - position;
  if (from <= 0 && to >= GROUP) return s;
  if (from >= GROUP || to <= 0) return otherwise;
  return between(from < 0 ? 0 : from, to > GROUP ? GROUP : to, s, otherwise);
}

// Scores -> weights e^(score - largest), 0 for keys that the query does not see; and largest and sum.
static void softmax(Walk& walk, int q, float* partial) {
  float* weights = walk.weights[q];
  const Lanes least = splat(-__builtin_inff()), none = splat(0.0f);
  Lanes top = least, total = none;
  for (int p = walk.begin; p < walk.end; p += GROUP)
    top = larger(seen(walk, q, p, load(weights + (p - walk.begin)), least), top);
  partial[0] = largest(top);
  const Lanes shift = splat(partial[0]);
  for (int p = walk.begin; p < walk.end; p += GROUP) {
    const Lanes w = exponential(load(weights + (p - walk.begin)) - shift);
    const Lanes kept = seen(walk, q, p, w, none);
    total = total + kept;
    store(weights + (p - walk.begin), kept);
  }
  partial[1] = sum(total);
}

// Weighted values, WIDTH lanes of D at a time. Positions that no query of the walk sees are not read:
// a slot beyond a sequence may hold anything, and 0 * NaN is NaN.
template <typename Cell, int COUNT, int WIDTH>
static void gather_values(const Walk& walk, int first, int last, int d, float* partials, size_t stride) {
  const AttentionItem& item = *walk.item;
  const int dim = item.shape->dim;
  Lanes sums[COUNT][WIDTH];
  QUIRE_UNROLL
  for (int q = 0; q < COUNT; q++)
    QUIRE_UNROLL
    for (int i = 0; i < WIDTH; i++) sums[q][i] = splat(0.0f);
  for (int p = first; p < last;) {
    const int stop = (p / GROUP + 1) * GROUP < last ? (p / GROUP + 1) * GROUP : last;
    const Cell* values = values_at<Cell>(item, p) + d;
    const float* scales = sizeof(Cell) == 1 ? scales_at(item, p, 1) : nullptr;
    for (; p < stop; p++, values += dim) {
      Lanes v[WIDTH];
      QUIRE_UNROLL
      for (int i = 0; i < WIDTH; i++) v[i] = widen(values + i * LANES);
      QUIRE_UNROLL
      for (int q = 0; q < COUNT; q++) {
        float weight = walk.weights[q][p - walk.begin];
        if (scales) weight *= *scales;
        const Lanes w = splat(weight);
        QUIRE_UNROLL
        for (int i = 0; i < WIDTH; i++) sums[q][i] = fma(w, v[i], sums[q][i]);
      }
      if (scales) scales++;
    }
  }
  QUIRE_UNROLL
  for (int q = 0; q < COUNT; q++)
    QUIRE_UNROLL
    for (int i = 0; i < WIDTH; i++) store(partials + q * stride + 2 + d + i * LANES, sums[q][i]);
}

template <typename Cell, int COUNT> static void attend_walk(Walk& walk, float* partials, size_t stride) {
  int first = walk.low[0], last = walk.high[0];
  for (int q = 1; q < COUNT; q++) {
    first = walk.low[q] < first ? walk.low[q] : first;
    last = walk.high[q] > last ? walk.high[q] : last;
  }
  walk.begin = first / GROUP * GROUP;
  walk.end = last;
  score<Cell, COUNT>(walk);
  for (int q = 0; q < COUNT; q++) softmax(walk, q, partials + q * stride);
  const int dim = walk.item->shape->dim;
  int d = 0;
  constexpr int WIDTH = values_together(COUNT);
  for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES) gather_values<Cell, COUNT, WIDTH>(walk, first, last, d, partials, stride);
  for (; d < dim; d += LANES) gather_values<Cell, COUNT, 1>(walk, first, last, d, partials, stride);
}

// With the number of queries as a constant.
template <typename Cell, int COUNT> static void attend_some(Walk& walk, int count, float* partials, size_t stride) {
  if (count == COUNT) return attend_walk<Cell, COUNT>(walk, partials, stride);
  if constexpr (COUNT > 1) attend_some<Cell, COUNT - 1>(walk, count, partials, stride);
}

// Runs the queries first..first + count - 1 of an item over one split. Query i is row i / G, head i % G.
// partials: [count] results of `stride` floats. Returns whether any of them sees a key of the split.
static bool attend_queries(const AttentionItem& item, int split, int first, int count, float* partials, size_t stride) {
  const HeadShape& shape = *item.shape;
  const int shared = shape.heads / shape.kv_heads;
  Walk walk;
  walk.item = &item;
  walk.is_first = first == 0;
  int used = 0, places[QUERIES];
  for (int i = 0; i < count; i++) {
    const int row = (first + i) / shared, head = item.head * shared + (first + i) % shared;
    const int position = item.first_position + row;
    const int oldest = item.window > position ? 0 : position - item.window + 1;
    const int low = oldest > split * SPLIT ? oldest : split * SPLIT;
    const int high = position + 1 < (split + 1) * SPLIT ? position + 1 : (split + 1) * SPLIT;
    partials[i * stride] = -__builtin_inff();
    partials[i * stride + 1] = 0.0f;
    if (low >= high) continue;
    walk.queries[used] = item.queries + (size_t)(item.first_row + row) * item.query_stride + (size_t)head * shape.dim;
    walk.low[used] = low;
    walk.high[used] = high;
    places[used++] = i;
  }
  if (!used) return false;
  // Queries that see keys are packed to the front of the walk, and their results moved back below.
  shape.wide_cache ? attend_some<uint16_t, QUERIES>(walk, used, partials, stride)
                   : attend_some<int8_t, QUERIES>(walk, used, partials, stride);
  for (int u = used - 1; u >= 0; u--) {
    if (places[u] == u) continue;
    memcpy(partials + places[u] * stride, partials + u * stride, (2 + shape.dim) * sizeof(float));
    partials[u * stride + 1] = 0.0f;
  }
  return true;
}

// total <- total and then partial, in this order.
static void merge(float* total, const float* partial, int dim) {
  if (partial[1] == 0.0f) return;
  if (total[1] == 0.0f) {
    memcpy(total, partial, (2 + dim) * sizeof(float));
    return;
  }
  const float top = total[0] > partial[0] ? total[0] : partial[0];
  const Lanes old_factor = exponential(splat(total[0] - top));
  const Lanes new_factor = exponential(splat(partial[0] - top));
  for (int d = 0; d < dim; d += LANES)
    store(total + 2 + d, fma(load(total + 2 + d), old_factor, load(partial + 2 + d) * new_factor));
  float sums[LANES];
  store(sums, fma(splat(total[1]), old_factor, splat(partial[1]) * new_factor));
  total[0] = top;
  total[1] = sums[0];
}

static void write_out(const float* total, int dim, float* out) {
  const Lanes factor = splat(1.0f / total[1]);
  for (int d = 0; d < dim; d += LANES) store(out + d, load(total + 2 + d) * factor);
}

constexpr int ITEM_QUERIES = 64;  // rows of an item times queries a KV head

// All splits of an item, merged.
static void attend_rows(const AttentionItem* item) {
  const HeadShape& shape = *item->shape;
  const int shared = shape.heads / shape.kv_heads, count = item->rows * shared;
  const size_t stride = 2 + shape.dim;
  float totals[ITEM_QUERIES * (2 + DIM_MAX)], partials[QUERIES * (2 + DIM_MAX)];
  for (int i = 0; i < count; i++) totals[i * stride + 1] = 0.0f;
  const int oldest = item->window > item->first_position ? 0 : item->first_position - item->window + 1;
  const int last = item->first_position + item->rows - 1;
  for (int split = oldest / SPLIT; split <= last / SPLIT; split++)
    for (int first = 0; first < count; first += QUERIES) {
      const int some = count - first < QUERIES ? count - first : QUERIES;
      if (!attend_queries(*item, split, first, some, partials, stride)) continue;
      for (int i = 0; i < some; i++) merge(totals + (first + i) * stride, partials + i * stride, shape.dim);
    }
  for (int i = 0; i < count; i++) {
    const size_t row = (size_t)(item->first_row + i / shared);
    const int head = item->head * shared + i % shared;
    write_out(totals + i * stride, shape.dim, item->out + row * item->out_stride + (size_t)head * shape.dim);
  }
}

// One split of an item, for another thread to merge. partials: [rows * G] results of 2 + D floats.
static void attend_split(const AttentionItem* item, int split, float* partials) {
  const size_t stride = 2 + item->shape->dim;
  const int count = item->rows * (item->shape->heads / item->shape->kv_heads);
  for (int first = 0; first < count; first += QUERIES) {
    const int some = count - first < QUERIES ? count - first : QUERIES;
    attend_queries(*item, split, first, some, partials + first * stride, stride);
  }
}

// The splits of one query, `stride` floats apart, merged in order.
static void merge_splits(const float* partials, int splits, size_t stride, int dim, float* out) {
  float total[2 + DIM_MAX];
  total[1] = 0.0f;
  for (int s = 0; s < splits; s++) merge(total, partials + s * stride, dim);
  write_out(total, dim, out);
}
