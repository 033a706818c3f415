/* SPDX-License-Identifier: Apache-2.0
 *
 * The tiles of a sequence's attention from its queries and keys, on CPUs with AVX-512 BF16. See
 * tiles.py for the layout, and encode.py for what is computed.
 *
 * One panel at a time, and of it the tiles that its rows see: scores, softmax and tiles of 4 rows
 * stay in the core's cache, where a whole map of floats would go through memory a dozen times.
 * Keys are laid out so that a dot product instruction takes two numbers of 16 keys. Threads are
 * those of OpenMP, see _tiles.c; the GIL is free meanwhile.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>

#include "_panels.h"

/* Numbers, not bytes. Row r sees the columns from r - before + 1 to r + after - 1. Panel p of each
 * head has room for its tiles from `starts[p]` on. */
typedef struct {
  int64_t heads, group, length, pairs; /* pairs: half the size of a head */
  int64_t query_row, query_head, key_row, key_head; /* strides */
  int64_t before, after, panels, wide;
  const int64_t *starts;
  float scale, soft_cap, dropped; /* soft_cap: 0 for none */
} Shape;

typedef struct {
  uint8_t *cells;
  uint16_t *scales;
  uint16_t *columns;
} Tiles;

#if defined(TARGET)
/* exp(x) to a few units of the last place, NaN of NaN: 2^n * exp(r) with |r| <= ln(2) / 2, whose
 * Taylor series ends within half a unit after the 7th power. ln(2) is in two parts (Cody and Waite,
 * Software Manual for the Elementary Functions, 1980), so that n * ln(2) costs r no digits. */
TARGET static inline __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(100), _mm512_max_ps(_mm512_set1_ps(-110), x));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                  _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e4p-1f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.7f7d1cp-20f), r);
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 720));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 120));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 24));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f / 6));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.5f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1));
  return _mm512_scalef_ps(sum, n);
}

/* cap * tanh(x / cap), from tanh(y) = 1 - 2 / (exp(2 y) + 1). */
TARGET static inline __m512 capped(__m512 x, float cap) {
  __m512 one = _mm512_set1_ps(1), two = _mm512_set1_ps(2);
  __m512 power = exponential(_mm512_mul_ps(x, _mm512_set1_ps(2 / cap)));
  __m512 tanh = _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(power, one)));
  return _mm512_mul_ps(tanh, _mm512_set1_ps(cap));
}

/* Which columns of a tile from `column` on are among those from `first` to before `stop`. */
static inline uint32_t seen(int64_t first, int64_t stop, int64_t column) {
  int64_t from = first > column ? first - column : 0, to = stop - column;
  if (from >= COLS || to <= from) return 0;
  uint32_t below = to >= COLS ? ~0u : (1u << to) - 1;
  return below & ~((1u << from) - 1);
}

/* Two numbers of each of a tile's keys, then the next two; keys from `length` on are zero. */
static void pack_keys(const uint16_t *key, const Shape *shape, int64_t tile, uint32_t *packed) {
  for (int64_t column = 0; column < COLS; ++column) {
    int64_t row = tile * COLS + column;
    for (int64_t pair = 0; pair < shape->pairs; ++pair) {
      uint32_t both = 0;
      if (row < shape->length) memcpy(&both, key + row * shape->key_row + 2 * pair, sizeof both);
      packed[pair * COLS + column] = both;
    }
  }
}

/* Scores of a panel's `rows` rows with the keys of a tile, minus infinity where a row does not see:
 * float [ROWS][COLS], `stride` apart. Raises `largest` of each row. */
TARGET static inline void score_tile(const Shape *shape, const uint16_t *const *query,
                                     const uint32_t *keys, const uint32_t *visible, float *scores,
                                     int64_t stride, __m512 *largest) {
  __m512 sums[ROWS][2];
  for (int row = 0; row < ROWS; ++row) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < shape->pairs; ++pair) {
    __m512bh low = (__m512bh)_mm512_loadu_si512(keys + pair * COLS);
    __m512bh high = (__m512bh)_mm512_loadu_si512(keys + pair * COLS + 16);
    for (int row = 0; row < ROWS; ++row) {
      int32_t both;
      memcpy(&both, query[row] + 2 * pair, sizeof both);
      __m512bh numbers = (__m512bh)_mm512_set1_epi32(both);
      sums[row][0] = _mm512_dpbf16_ps(sums[row][0], numbers, low);
      sums[row][1] = _mm512_dpbf16_ps(sums[row][1], numbers, high);
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int half = 0; half < 2; ++half) {
      __m512 score = _mm512_mul_ps(sums[row][half], _mm512_set1_ps(shape->scale));
      if (shape->soft_cap > 0) score = capped(score, shape->soft_cap);
      score = _mm512_mask_blend_ps((__mmask16)(visible[row] >> 16 * half),
                                   _mm512_set1_ps(-INFINITY), score);
      _mm512_storeu_ps(scores + row * stride + 16 * half, score);
      largest[row] = _mm512_max_ps(largest[row], score);
    }
}

/* Makes a row's scores of `count` tiles exponentials of what they are below the largest, and gives
 * each tile's sum and largest of them; returns the sum of all. */
TARGET static inline float exponentiate(float *scores, int64_t count, float largest, int row,
                                        TileSums *sums) {
  float sum = 0;
  for (int64_t tile = 0; tile < count; ++tile) {
    float *of = scores + tile * COLS;
    __m512 low = exponential(_mm512_sub_ps(_mm512_loadu_ps(of), _mm512_set1_ps(largest)));
    __m512 high = exponential(_mm512_sub_ps(_mm512_loadu_ps(of + 16), _mm512_set1_ps(largest)));
    _mm512_storeu_ps(of, low);
    _mm512_storeu_ps(of + 16, high);
    sums[tile].mass[row] = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
    sums[tile].largest[row] = _mm512_reduce_max_ps(_mm512_max_ps(low, high));
    sum += sums[tile].mass[row];
  }
  return sum;
}

/* Cells of a row of a tile: square roots of its numbers times `factor`. */
TARGET static inline void round_roots(const float *numbers, float factor, uint8_t *cells) {
  for (int half = 0; half < 2; ++half) {
    __m512 number = _mm512_mul_ps(_mm512_loadu_ps(numbers + 16 * half), _mm512_set1_ps(factor));
    __m512 root = _mm512_min_ps(_mm512_sqrt_ps(number), _mm512_set1_ps(255));
    _mm_storeu_si128((__m128i *)(cells + 16 * half),
                     _mm512_cvtusepi32_epi8(_mm512_cvtps_epu32(root)));
  }
}

/* Tiles and log-sum-exps of the panel whose first row is `first`; returns how many are kept. `keys`
 * are packed, and `scores` has room for [ROWS][wide * COLS]. */
TARGET static int64_t encode_panel(const Shape *shape, const uint16_t *query, const uint32_t *keys,
                                   int64_t first, float *scores, Room *room, Tiles to, float *lse) {
  const int64_t rows = shape->length - first < ROWS ? shape->length - first : ROWS;
  const int64_t stride = shape->wide * COLS;
  int64_t first_seen[ROWS] = {0}, stop_seen[ROWS] = {0};
  const uint16_t *queries[ROWS];
  __m512 most[ROWS];
  for (int64_t row = 0; row < ROWS; ++row) {
    /* What is no row of the text sees nothing. */
    queries[row] = query + (row < rows ? first + row : first) * shape->query_row;
    most[row] = _mm512_set1_ps(-INFINITY);
    if (row >= rows) continue;
    int64_t from = first + row - shape->before + 1, to = first + row + shape->after;
    first_seen[row] = from > 0 ? from : 0;
    stop_seen[row] = to < shape->length ? to : shape->length;
  }
  const int64_t start = first_seen[0] / COLS, count = (stop_seen[rows - 1] - 1) / COLS + 1 - start;
  for (int64_t tile = 0; tile < count; ++tile) {
    uint32_t visible[ROWS];
    for (int row = 0; row < ROWS; ++row)
      visible[row] = seen(first_seen[row], stop_seen[row], (start + tile) * COLS);
    score_tile(shape, queries, keys + (start + tile) * shape->pairs * COLS, visible,
               scores + tile * COLS, stride, most);
  }
  memset(room->sums, 0, count * sizeof *room->sums);
  float inverse[ROWS], grown[ROWS];
  for (int row = 0; row < rows; ++row) {
    float largest = _mm512_reduce_max_ps(most[row]);
    float sum = exponentiate(scores + row * stride, count, largest, row, room->sums);
    lse[row] = largest + logf(sum);
    inverse[row] = 1 / sum;
    for (int64_t tile = 0; tile < count; ++tile) {
      room->sums[tile].mass[row] *= inverse[row];
      room->sums[tile].largest[row] *= inverse[row];
    }
  }
  choose_kept(room->sums, count, shape->dropped, room->order, room->worst, grown);
  int64_t kept = 0;
  for (int64_t tile = 0; tile < count; ++tile) {
    if (!room->sums[tile].kept) continue;
    for (int row = 0; row < ROWS; ++row) {
      uint8_t *cells = to.cells + (kept * ROWS + row) * COLS;
      float scale = rounded_up(room->sums[tile].largest[row] / (255 * 255));
      to.scales[kept * ROWS + row] = nearest_bfloat16(scale * grown[row]);
      if (scale > 0)
        round_roots(scores + row * stride + tile * COLS, inverse[row] / fmaxf(scale, 1e-38f), cells);
      else
        memset(cells, 0, COLS);
    }
    to.columns[kept++] = (uint16_t)(start + tile);
  }
  return kept;
}

/* All panels; `counts` [heads, panels] gets how many tiles each has. `packed` has room for the keys
 * of all KV heads, padded to whole tiles. Returns 0 without memory. */
static int encode(const Shape *shape, const uint16_t *query, const uint16_t *key, uint32_t *packed,
                  Tiles to, int64_t *counts, float *lse) {
  const int64_t of_head = shape->wide * shape->pairs * COLS, room_of_head = shape->starts[shape->panels];
  int failed = 0;
#pragma omp parallel if (shape->heads * shape->length > 512)
  {
#pragma omp for collapse(2) schedule(static)
    for (int64_t head = 0; head < shape->heads / shape->group; ++head)
      for (int64_t tile = 0; tile < shape->wide; ++tile)
        pack_keys(key + head * shape->key_head, shape, tile,
                  packed + head * of_head + tile * shape->pairs * COLS);
    Room room;
    float *scores = malloc(ROWS * shape->wide * COLS * sizeof *scores);
    const int ready = make_room(&room, shape->wide) && scores;
#pragma omp atomic
    failed |= !ready;
#pragma omp for collapse(2) schedule(dynamic, 8)
    for (int64_t head = 0; head < shape->heads; ++head)
      for (int64_t panel = 0; panel < shape->panels; ++panel) {
        if (!ready) continue;
        const int64_t at = head * room_of_head + shape->starts[panel];
        Tiles own = {to.cells + at * ROWS * COLS, to.scales + at * ROWS, to.columns + at};
        counts[head * shape->panels + panel] = encode_panel(
            shape, query + head * shape->query_head, packed + head / shape->group * of_head,
            panel * ROWS, scores, &room, own, lse + head * shape->length + panel * ROWS);
      }
    free(scores);
    free_room(&room);
  }
  return !failed;
}
#endif

/* Tiles of `heads` * `panels` panels side by side: `ends` says where each panel's are to end. */
static void join(Tiles from, const int64_t *starts, const uint32_t *ends, int64_t heads,
                 int64_t panels, Tiles to) {
#pragma omp parallel for collapse(2) schedule(static) if (heads * panels > 128)
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t place = head * panels + panel;
      const size_t at = head * starts[panels] + starts[panel];
      const size_t start = ends[place], count = ends[place + 1] - start;
      memcpy(to.cells + start * ROWS * COLS, from.cells + at * ROWS * COLS, count * ROWS * COLS);
      memcpy(to.scales + start * ROWS, from.scales + at * ROWS, count * ROWS * sizeof *to.scales);
      memcpy(to.columns + start, from.columns + at, count * sizeof *to.columns);
    }
}

PyDoc_STRVAR(supported_doc, "supported() -> bool: whether this CPU has the instructions.");
static PyObject *py_supported(PyObject *self, PyObject *unused) {
  return PyBool_FromLong(SUPPORTED);
}

PyDoc_STRVAR(encode_doc,
             "encode(query, key, packed, starts, cells, scales, columns, counts, lse, heads, group, "
             "length, pairs, query_row, query_head, key_row, key_head, before, after, scale, "
             "soft_cap, dropped): the tiles of each panel, at its own start. Addresses, sizes, and "
             "strides in numbers.");
static PyObject *py_encode(PyObject *self, PyObject *args) {
  unsigned long long query, key, packed, starts, cells, scales, columns, counts, lse;
  long long heads, group, length, pairs, query_row, query_head, key_row, key_head, before, after;
  float scale, soft_cap, dropped;
  int done = 0;
  if (!PyArg_ParseTuple(args, "KKKKKKKKKLLLLLLLLLLfff", &query, &key, &packed, &starts, &cells,
                        &scales, &columns, &counts, &lse, &heads, &group, &length, &pairs,
                        &query_row, &query_head, &key_row, &key_head, &before, &after, &scale,
                        &soft_cap, &dropped))
    return NULL;
#if defined(TARGET)
  Shape shape = {heads,    group,  length,
                 pairs,    query_row, query_head,
                 key_row,  key_head,  before,
                 after,    (length + ROWS - 1) / ROWS, (length + COLS - 1) / COLS,
                 (const int64_t *)(uintptr_t)starts, scale, soft_cap, dropped};
  Tiles to = {(uint8_t *)(uintptr_t)cells, (uint16_t *)(uintptr_t)scales,
              (uint16_t *)(uintptr_t)columns};
  Py_BEGIN_ALLOW_THREADS;
  done = encode(&shape, (const uint16_t *)(uintptr_t)query, (const uint16_t *)(uintptr_t)key,
                (uint32_t *)(uintptr_t)packed, to, (int64_t *)(uintptr_t)counts,
                (float *)(uintptr_t)lse);
  Py_END_ALLOW_THREADS;
#endif
  if (!done) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyDoc_STRVAR(join_doc,
             "join(cells, scales, columns, starts, ends, heads, panels, to_cells, to_scales, "
             "to_columns): what encode() made, side by side. Addresses.");
static PyObject *py_join(PyObject *self, PyObject *args) {
  unsigned long long cells, scales, columns, starts, ends, to_cells, to_scales, to_columns;
  long long heads, panels;
  if (!PyArg_ParseTuple(args, "KKKKKLLKKK", &cells, &scales, &columns, &starts, &ends, &heads,
                        &panels, &to_cells, &to_scales, &to_columns))
    return NULL;
  Tiles from = {(uint8_t *)(uintptr_t)cells, (uint16_t *)(uintptr_t)scales,
                (uint16_t *)(uintptr_t)columns};
  Tiles to = {(uint8_t *)(uintptr_t)to_cells, (uint16_t *)(uintptr_t)to_scales,
              (uint16_t *)(uintptr_t)to_columns};
  Py_BEGIN_ALLOW_THREADS;
  join(from, (const int64_t *)(uintptr_t)starts, (const uint32_t *)(uintptr_t)ends, heads, panels,
       to);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"supported", py_supported, METH_NOARGS, supported_doc},
    {"encode", py_encode, METH_VARARGS, encode_doc},
    {"join", py_join, METH_VARARGS, join_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_encode", "Tiles of attention from queries and keys.", -1, methods,
};

PyMODINIT_FUNC PyInit__encode(void) { return PyModule_Create(&module); }
