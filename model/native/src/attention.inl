// Attention over the paged cache. A query attends to its keys in the order of their positions, in splits
// of SPLIT positions that begin at multiples of SPLIT; each split gives (largest, sum, values), and
// these are merged in order. The arithmetic of a query depends on nothing else, so neither the other
// queries of a tile nor the distribution of splits over threads can change a bit. Cost is linear in the
// context.

// Queries of one walk over the keys; and how many groups of keys, and LANES of values, these take at once:
// enough sums to hide the latency of `fma`, and no more than there are registers.
#if defined(__AVX512F__)
constexpr int QUERIES = 4, GROUPS_TOGETHER = 4;
constexpr int values_together(int) { return 4; }
constexpr int NARROW_QUERIES = 4, NARROW_SUMS = 20;  // of values in 8 bits; registers of sums
#else
constexpr int QUERIES = 6, GROUPS_TOGETHER = 1;  // sums of two registers each
constexpr int values_together(int queries) { return queries <= 2 ? 4 : 1; }
constexpr int NARROW_QUERIES = 3, NARROW_SUMS = 12;  // of values in 8 bits; registers of sums
#endif
#if defined(QUIRE_TILES_FILL)
constexpr int MOST_QUERIES = 16;  // of an 8-bit cache, by tiles: see narrow_amx.inl
#else
constexpr int MOST_QUERIES = QUERIES;
#endif

// The weights of a split's values in 14 bits, as the variant's instructions take them.
union WeightCodes {
  uint8_t bytes[2 * SPLIT];  // of all values the upper 7 bits, then of all the lower ones
  int16_t words[SPLIT];
};

#include QUIRE_WHOLE

// The positions of a split that an item reads, and that are prefetched while another one is computed.
struct Coming {
  const AttentionItem* item;  // or null
  int begin, end;             // begin is a multiple of GROUP
  bool is_cold;               // nothing was prefetched for the computed one
};

// The state of one walk over the keys of a split, by up to MOST_QUERIES queries.
struct Walk {
  const AttentionItem* item;
  const float* queries[MOST_QUERIES];
  int low[MOST_QUERIES], high[MOST_QUERIES];  // positions that each query sees: low <= p < high
  int begin, end;                             // of the walk; begin is a multiple of GROUP
  bool is_first;  // of the walks over these keys: the later ones find them in a cache
  Coming coming;  // the keys and values to prefetch
  // Scores, then weights; index: position - begin. The distance of rows is no power of two: they would share few sets
  // of the L1 cache.
  float weights[MOST_QUERIES][SPLIT + LANES];
  // Of an 8-bit cache: see narrow.inl.
  float scales_of_keys[SPLIT], scales_of_values[SPLIT];  // index: position - begin
  int8_t codes[MOST_QUERIES][DIM_MAX];
  float scales[MOST_QUERIES], biases[MOST_QUERIES], value_scales[MOST_QUERIES];
  WeightCodes weight_codes[MOST_QUERIES];
};

static uint8_t* region_at(const AttentionItem& item, int position) {
  const HeadShape& shape = *item.shape;
  const size_t block = (size_t)item.blocks[position / shape.block_size];
  return item.pool.base + block * item.pool.block_bytes + (size_t)item.head * item.pool.region_bytes;
}

// which: 0 keys, of a group; 1 values, of a position, in 8 bits of a multiple of 4.
template <typename Cell> QUIRE_INLINE const Cell* cells_at(const AttentionItem& item, int position, int which) {
  const HeadShape& shape = *item.shape;
  const int offset = position % shape.block_size + which * shape.block_size;
  return (const Cell*)region_at(item, position) + (size_t)offset * shape.dim;
}

// Scales lie behind the cells of an 8-bit region.
static const float* scales_at(const AttentionItem& item, int position, int which) {
  const HeadShape& shape = *item.shape;
  const size_t cells = (size_t)shape.block_size * shape.dim;
  const float* scales = (const float*)(region_at(item, position) + 2 * cells);
  return scales + which * shape.block_size + position % shape.block_size;
}

// What is prefetched while keys (which = 0) or values (1) of WIDTH groups are computed with: those of the next
// walk, which is a microsecond away. Blocks lie far apart, so the hardware does not do it.
template <typename Cell, int WIDTH> struct Fetch {
  const char* ahead[3 * WIDTH];
  int count = 0;

  QUIRE_INLINE Fetch(const Walk& walk, int position, int which) {
    if (!walk.is_first) return;
    for (int g = 0; g < WIDTH; g++) {
      const int now = position + g * GROUP, next = walk.coming.begin + now - walk.begin;
      if (next < walk.coming.end) ahead[count++] = (const char*)cells_at<Cell>(*walk.coming.item, next, which);
      if (!walk.coming.is_cold || which == 1) continue;
      ahead[count++] = (const char*)cells_at<Cell>(*walk.item, now, 1);
      if (now + WIDTH * GROUP < walk.end) ahead[count++] = (const char*)cells_at<Cell>(*walk.item, now + WIDTH * GROUP, 0);
    }
  }
  QUIRE_INLINE void line(int i) const {
    for (int a = 0; a < count; a++) __builtin_prefetch(ahead[a] + (size_t)i * 64, 0, 2);
  }
};

// Keeps the lanes of a group that a query sees.
QUIRE_INLINE Lanes seen(const Walk& walk, int q, int position, Lanes s, Lanes otherwise) {
  const int from = walk.low[q] - position, to = walk.high[q] - position;
  if (from <= 0 && to >= GROUP) return s;
  if (from >= GROUP || to <= 0) return otherwise;
  return between(from < 0 ? 0 : from, to > GROUP ? GROUP : to, s, otherwise);
}

// Calls work(position - begin, seen) for the groups of a walk, in order; seen(x, otherwise) keeps the lanes that the
// query sees, and costs nothing where it sees them all.
template <typename Work> QUIRE_INLINE void each_group(const Walk& walk, int q, Work work) {
  const int whole = (walk.low[q] + GROUP - 1) / GROUP * GROUP, rest = walk.high[q] / GROUP * GROUP;
  int p = walk.begin;
  const auto edge = [&](Lanes x, Lanes otherwise) { return seen(walk, q, p, x, otherwise); };
  for (; p < whole && p < walk.end; p += GROUP) work(p - walk.begin, edge);
  for (; p < rest; p += GROUP) work(p - walk.begin, [](Lanes x, Lanes) { return x; });
  for (; p < walk.end; p += GROUP) work(p - walk.begin, edge);
}

// Scores -> weights e^(score - largest), 0 for keys that the query does not see; and largest and sum. In 8 bits
// weights have the scales of their values in them; returns the largest of these.
template <bool WIDE> static float softmax(Walk& walk, int q, float* partial) {
  float* weights = walk.weights[q];
  const Lanes least = splat(-__builtin_inff()), none = splat(0.0f);
  Lanes top = least, total = none, most = none;
  each_group(walk, q, [&](int at, auto seen) { top = larger(seen(load(weights + at), least), top); });
  partial[0] = largest(top);
  const Lanes shift = splat(partial[0]);
  each_group(walk, q, [&](int at, auto seen) {
    Lanes w = exponential_of(larger(splat(-87.0f), load(weights + at) - shift));
    total = total + seen(w, none);
    if constexpr (!WIDE) w = w * load(walk.scales_of_values + at);
    w = seen(w, none);
    most = larger(w, most);
    store(weights + at, w);
  });
  partial[1] = sum(total);
  return WIDE ? 1.0f : largest(most);
}

#include "wide.inl"
#include "narrow.inl"

template <bool WIDE, int COUNT, int WIDTH> QUIRE_INLINE void score_groups(Walk& walk, int position) {
  if constexpr (WIDE) score_wide_groups<COUNT, WIDTH>(walk, position);
  else score_narrow_groups<COUNT, WIDTH>(walk, position);
}

template <bool WIDE, int COUNT> static void score(Walk& walk) {
  int position = walk.begin;
  for (; position + (GROUPS_TOGETHER - 1) * GROUP < walk.end; position += GROUPS_TOGETHER * GROUP)
    score_groups<WIDE, COUNT, GROUPS_TOGETHER>(walk, position);
  if constexpr (GROUPS_TOGETHER == 4) switch ((walk.end - position + GROUP - 1) / GROUP) {
    case 3: return score_groups<WIDE, COUNT, 3>(walk, position);
    case 2: return score_groups<WIDE, COUNT, 2>(walk, position);
    default: break;
  }
  for (; position < walk.end; position += GROUP) score_groups<WIDE, COUNT, 1>(walk, position);
}

// Scores -> weights, or their codes.
template <bool WIDE> QUIRE_INLINE void weigh_keys(Walk& walk, int count, float* partials, size_t stride) {
  for (int q = 0; q < count; q++) {
    float* partial = partials + q * stride;
    const float most = softmax<WIDE>(walk, q, partial);
    if constexpr (!WIDE) encode_weights(walk, q, most, partial[1] == partial[1]);
  }
}

// The first key that any query sees, and sets the bounds of the walk.
static int find_bounds(Walk& walk, int count) {
  int first = walk.low[0];
  walk.end = walk.high[0];
  for (int q = 1; q < count; q++) {
    first = walk.low[q] < first ? walk.low[q] : first;
    walk.end = walk.high[q] > walk.end ? walk.high[q] : walk.end;
  }
  walk.begin = first / GROUP * GROUP;
  return first;
}

template <bool WIDE, int COUNT> static void attend_walk(Walk& walk, float* partials, size_t stride) {
  const int first = find_bounds(walk, COUNT), last = walk.end;
  if constexpr (!WIDE) encode(walk, COUNT);
  score<WIDE, COUNT>(walk);
  weigh_keys<WIDE>(walk, COUNT, partials, stride);
  const int dim = walk.item->shape->dim;
  if constexpr (!WIDE) return gather_all_narrow<COUNT, 0>(walk, first, last, partials, stride);
  int d = 0;
  constexpr int WIDTH = values_together(COUNT);
  for (; d + WIDTH * LANES <= dim; d += WIDTH * LANES) gather_wide<COUNT, WIDTH>(walk, first, last, d, partials, stride);
  for (; d < dim; d += LANES) gather_wide<COUNT, 1>(walk, first, last, d, partials, stride);
}

#if defined(QUIRE_TILES_FILL)
#include "narrow_amx.inl"
#endif

// With the number of queries as a constant.
template <bool WIDE, int COUNT> static void attend_some(Walk& walk, int count, float* partials, size_t stride) {
  if (count == COUNT) return attend_walk<WIDE, COUNT>(walk, partials, stride);
  if constexpr (COUNT > 1) attend_some<WIDE, COUNT - 1>(walk, count, partials, stride);
}

static int queries_together(const HeadShape& shape, int left) {
  const int most = shape.wide_cache || shape.dim % K_STEP ? QUERIES : MOST_QUERIES;
  return left < most ? left : most;
}

static void attend_together(Walk& walk, int count, float* partials, size_t stride) {
#if defined(QUIRE_TILES_FILL)
  if (count > QUERIES) return attend_tiles(walk, count, partials, stride);
#endif
  walk.item->shape->wide_cache ? attend_some<true, QUERIES>(walk, count, partials, stride)
                               : attend_some<false, QUERIES>(walk, count, partials, stride);
}

static int oldest_of(const AttentionItem& item) {
  return item.window > item.first_position ? 0 : item.first_position - item.window + 1;
}

static Coming coming_of(const AttentionItem* item, int split, bool is_cold) {
  if (!item) return {nullptr, 0, 0, is_cold};
  const int oldest = oldest_of(*item), last = item->first_position + item->rows - 1;
  if (split < 0) split = oldest / SPLIT;
  const int begin = oldest > split * SPLIT ? oldest / GROUP * GROUP : split * SPLIT;
  return {item, begin, last < (split + 1) * SPLIT ? last + 1 : (split + 1) * SPLIT, is_cold};
}

// Runs the queries first..first + count - 1 of an item over one split. Query i is row i / G, head i % G.
// partials: [count] results of `stride` floats. Returns whether any of them sees a key of the split.
static bool attend_queries(const AttentionItem& item, int split, const Coming& coming, int first, int count,
                           float* partials, size_t stride) {
  const HeadShape& shape = *item.shape;
  const int shared = shape.heads / shape.kv_heads;
  Walk walk;
  walk.item = &item;
  walk.is_first = first == 0;
  walk.coming = coming;
  int used = 0, places[MOST_QUERIES];
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
  attend_together(walk, used, partials, stride);
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
  float totals[ITEM_QUERIES * (2 + DIM_MAX)], partials[MOST_QUERIES * (2 + DIM_MAX)];
  for (int i = 0; i < count; i++) totals[i * stride + 1] = 0.0f;
  const int oldest = oldest_of(*item) / SPLIT, last = (item->first_position + item->rows - 1) / SPLIT;
  for (int split = oldest; split <= last; split++) {
    const bool is_cold = item->is_cold && split == oldest;
    const Coming coming = split < last ? coming_of(item, split + 1, is_cold) : coming_of(item->next, item->next_split, is_cold);
    for (int first = 0, some; first < count; first += some) {
      some = queries_together(shape, count - first);
      if (!attend_queries(*item, split, coming, first, some, partials, stride)) continue;
      for (int i = 0; i < some; i++) merge(totals + (first + i) * stride, partials + i * stride, shape.dim);
    }
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
  const Coming coming = coming_of(item->next, item->next_split, item->is_cold);
  for (int first = 0, some; first < count; first += some) {
    some = queries_together(*item->shape, count - first);
    attend_queries(*item, split, coming, first, some, partials + first * stride, stride);
  }
}

// The splits of one query, `stride` floats apart, merged in order.
static void merge_splits(const float* partials, int splits, size_t stride, int dim, float* out) {
  float total[2 + DIM_MAX];
  total[1] = 0.0f;
  for (int s = 0; s < splits; s++) merge(total, partials + s * stride, dim);
  write_out(total, dim, out);
}
