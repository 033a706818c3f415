/* SPDX-License-Identifier: Apache-2.0
 *
 * Tiled maps: making them, on any CPU, and their products with values, on CPUs with AVX-512 BF16.
 * See tiles.py for the layout.
 *
 * A tile's 8-bit cells become bfloat16 in registers and a small buffer, so that a map is read from
 * memory at half the bytes of a bfloat16 one. Values are interleaved by pairs of tokens, which is
 * what the dot product instruction takes. Threads are those of OpenMP, which torch and vLLM use
 * and pin; the GIL is free meanwhile.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>

#include "_panels.h"

static float from_bfloat16(uint16_t number) {
  uint32_t bits = (uint32_t)number << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* Tiles of the rows from `first` on of a head [length, length]; returns how many are kept. */
static int64_t tile_panel(const float *probs, int64_t length, int64_t first, float dropped,
                          Room *room, uint8_t *cells, uint16_t *scales, uint16_t *columns) {
  int64_t rows = length - first < ROWS ? length - first : ROWS, wide = (length + COLS - 1) / COLS;
  TileSums *sums = room->sums;
  float grown[ROWS];
  int64_t kept = 0;
  for (int64_t tile = 0; tile < wide; ++tile) {
    int64_t start = tile * COLS, stop = start + COLS < length ? start + COLS : length;
    memset(sums + tile, 0, sizeof *sums);
    for (int64_t row = 0; row < rows; ++row) {
      const float *from = probs + (first + row) * length;
      float mass = 0, largest = 0;
#pragma omp simd reduction(+ : mass) reduction(max : largest)
      for (int64_t column = start; column < stop; ++column) {
        mass += from[column];
        largest = from[column] > largest ? from[column] : largest;
      }
      sums[tile].mass[row] = mass;
      sums[tile].largest[row] = largest;
    }
  }
  choose_kept(sums, wide, dropped, room->order, room->worst, grown);
  for (int64_t tile = 0; tile < wide; ++tile) {
    if (!sums[tile].kept) continue;
    int64_t start = tile * COLS, stop = start + COLS < length ? start + COLS : length;
    uint8_t *to = cells + kept * ROWS * COLS;
    memset(to, 0, ROWS * COLS);
    for (int64_t row = 0; row < ROWS; ++row) {
      float scale = row < rows ? rounded_up(sums[tile].largest[row] / (255 * 255)) : 0;
      scales[kept * ROWS + row] = nearest_bfloat16(scale * grown[row]);
      if (!(scale > 0)) continue;
      const float *from = probs + (first + row) * length;
#pragma omp simd
      for (int64_t column = start; column < stop; ++column) {
        float cell = sqrtf(from[column] / scale) + 0.5f;
        to[row * COLS + column - start] = (uint8_t)(cell < 255 ? cell : 255);
      }
    }
    columns[kept++] = (uint16_t)tile;
  }
  return kept;
}

/* Tiles of a head, panel after panel; `counts` gets each panel's. Returns all, -1 without memory. */
static int64_t tile_head(const float *probs, int64_t length, float dropped, uint8_t *cells,
                         uint16_t *scales, uint16_t *columns, int64_t *counts) {
  int64_t wide = (length + COLS - 1) / COLS, panels = (length + ROWS - 1) / ROWS, total = 0;
  Room room;
  if (make_room(&room, wide))
    for (int64_t panel = 0; panel < panels; ++panel) {
      counts[panel] = tile_panel(probs, length, panel * ROWS, dropped, &room,
                                 cells + total * ROWS * COLS, scales + total * ROWS, columns + total);
      total += counts[panel];
    }
  else
    total = -1;
  free_room(&room);
  return total;
}

/* Tiles of heads [heads, length, length], each head's at the start of its own room for all; `found`
 * gets how many each has, -1 without memory. */
static void tile_heads(const float *probs, int64_t heads, int64_t length, float dropped,
                       uint8_t *cells, uint16_t *scales, uint16_t *columns, int64_t *counts,
                       int64_t *found) {
  const int64_t panels = (length + ROWS - 1) / ROWS;
  const int64_t most = panels * ((length + COLS - 1) / COLS);
#pragma omp parallel for schedule(dynamic, 1) if (heads * length > 512)
  for (int64_t head = 0; head < heads; ++head)
    found[head] = tile_head(probs + head * length * length, length, dropped,
                            cells + head * most * ROWS * COLS, scales + head * most * ROWS,
                            columns + head * most, counts + head * panels);
}

/* Drops tiles of `count` panels in place, each of at most `wide`, and moves the rest together;
 * returns how many are left, -1 without memory. */
static int64_t prune(uint8_t *cells, uint16_t *scales, uint16_t *columns, uint32_t *panels,
                     int64_t count, int64_t wide, float dropped) {
  Room room;
  int64_t left = make_room(&room, wide) ? 0 : -1;
  uint32_t start = 0;
  for (int64_t panel = 0; left >= 0 && panel < count; ++panel) {
    uint32_t stop = panels[panel + 1];
    float grown[ROWS];
    for (uint32_t tile = start; tile < stop; ++tile)
      for (int row = 0; row < ROWS; ++row) {
        const uint8_t *from = cells + ((size_t)tile * ROWS + row) * COLS;
        uint32_t squares = 0, largest = 0;
        for (int column = 0; column < COLS; ++column) {
          uint32_t cell = from[column];
          squares += cell * cell;
          largest = cell > largest ? cell : largest;
        }
        float scale = from_bfloat16(scales[(size_t)tile * ROWS + row]);
        room.sums[tile - start].mass[row] = scale * (float)squares;
        room.sums[tile - start].largest[row] = scale * (float)(largest * largest);
      }
    choose_kept(room.sums, stop - start, dropped, room.order, room.worst, grown);
    for (uint32_t tile = start; tile < stop; ++tile) {
      if (!room.sums[tile - start].kept) continue;
      memmove(cells + (size_t)left * ROWS * COLS, cells + (size_t)tile * ROWS * COLS, ROWS * COLS);
      for (int row = 0; row < ROWS; ++row)
        scales[left * ROWS + row] =
            nearest_bfloat16(from_bfloat16(scales[(size_t)tile * ROWS + row]) * grown[row]);
      columns[left++] = columns[tile];
    }
    start = stop;
    panels[panel + 1] = (uint32_t)left;
  }
  free_room(&room);
  return left;
}

/* Whether no panel has more tiles than its rows see, every tile begins where the last of them still
 * sees, and no scale, as bits, is above `largest`: numbers below zero and not finite are. */
static int sound(const uint16_t *columns, const uint16_t *scales, const uint32_t *panels,
                 int64_t count, int64_t panels_per_head, int64_t length, int causal,
                 uint16_t largest) {
  int fine = 1;
  for (int64_t panel = 0; panel < count; ++panel) {
    int64_t last = panel % panels_per_head * ROWS + ROWS - 1;
    if (!causal || last > length - 1) last = length - 1;
    fine &= (int64_t)panels[panel + 1] - panels[panel] <= last / COLS + 1;
    for (uint32_t tile = panels[panel]; tile < panels[panel + 1]; ++tile) {
      fine &= (int64_t)columns[tile] * COLS <= last;
      for (int row = 0; row < ROWS; ++row) fine &= scales[(size_t)tile * ROWS + row] <= largest;
    }
  }
  return fine;
}

#if defined(TARGET)
typedef struct {
  const uint8_t *cells;
  const uint16_t *scales;
  const uint16_t *columns;
  const uint32_t *panels;
  const uint16_t *values; /* interleaved */
  int64_t width;          /* columns of values, a multiple of 16 */
} Operands;

/* Rows of one panel times 16 * lanes columns of the values, from column `first` on. */
TARGET static inline __attribute__((always_inline)) void panel_times_values(
    const Operands *with, int64_t panel, int64_t first, const int lanes, uint16_t *out,
    int64_t stride, int64_t rows) {
  uint16_t probs[ROWS][COLS] __attribute__((aligned(64)));
  __m512 sums[ROWS][4];
  for (int row = 0; row < ROWS; ++row)
    for (int lane = 0; lane < lanes; ++lane) sums[row][lane] = _mm512_setzero_ps();
  for (uint32_t tile = with->panels[panel]; tile < with->panels[panel + 1]; ++tile) {
    const uint8_t *cells = with->cells + (size_t)tile * ROWS * COLS;
    for (int row = 0; row < ROWS; ++row) {
      const __m128i *packed = (const __m128i *)(cells + row * COLS);
      __m512 scale = _mm512_castsi512_ps(
          _mm512_set1_epi32((int)((uint32_t)with->scales[(size_t)tile * ROWS + row] << 16)));
      __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(packed)));
      __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(packed + 1)));
      low = _mm512_mul_ps(low, low);
      high = _mm512_mul_ps(high, high);
      _mm512_store_si512(probs[row], (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(scale, high),
                                                                  _mm512_mul_ps(scale, low)));
    }
    const uint16_t *values =
        with->values + (size_t)with->columns[tile] * COLS * with->width + 2 * first;
    for (int pair = 0; pair < COLS / 2; ++pair, values += 2 * with->width) {
      __m512bh value[4];
      for (int lane = 0; lane < lanes; ++lane)
        value[lane] = (__m512bh)_mm512_loadu_si512(values + 32 * lane);
      for (int row = 0; row < ROWS; ++row) {
        int32_t both;
        memcpy(&both, &probs[row][2 * pair], sizeof both);
        __m512bh prob = (__m512bh)_mm512_set1_epi32(both);
        for (int lane = 0; lane < lanes; ++lane)
          sums[row][lane] = _mm512_dpbf16_ps(sums[row][lane], prob, value[lane]);
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row)
    for (int lane = 0; lane < lanes; ++lane)
      _mm256_storeu_si256((__m256i *)(out + row * stride + first + 16 * lane),
                          (__m256i)_mm512_cvtneps_pbh(sums[row][lane]));
}

TARGET static void head_times_values(const Operands *with, int64_t panel, uint16_t *out,
                                     int64_t stride, int64_t rows) {
  int64_t first = 0;
  for (; first + 64 <= with->width; first += 64)
    panel_times_values(with, panel, first, 4, out, stride, rows);
  switch ((with->width - first) / 16) {
    case 3: panel_times_values(with, panel, first, 3, out, stride, rows); break;
    case 2: panel_times_values(with, panel, first, 2, out, stride, rows); break;
    case 1: panel_times_values(with, panel, first, 1, out, stride, rows); break;
  }
}

/* Rows 2 i and 2 i + 1 of `value`, number by number in turn; rows from `length` on are zero. */
TARGET static void interleave(const uint16_t *value, int64_t stride, int64_t length, int64_t width,
                              int64_t row, uint16_t *out) {
  for (int64_t at = 0; at < width; at += 16) {
    __m512i even = _mm512_setzero_si512(), odd = even;
    if (row < length)
      even =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(value + row * stride + at)));
    if (row + 1 < length)
      odd = _mm512_cvtepu16_epi32(
          _mm256_loadu_si256((const __m256i *)(value + (row + 1) * stride + at)));
    _mm512_storeu_si512(out + 2 * at, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
  }
}

/* Numbers, not bytes: `groups` KV groups of `heads` heads, of which the first `rows` rows are
 * wanted, times values of `length` tokens and `width` columns. */
typedef struct {
  int64_t groups, heads, panels_per_head, rows, length, width;
  int64_t value_group, value_row, out_group, out_head, out_row; /* strides */
} Shape;

/* `scratch` has room for the values of all groups, padded to whole tiles. */
static void multiply(const Operands *of_map, const uint16_t *value, uint16_t *scratch,
                     uint16_t *out, const Shape *shape) {
  const int64_t pairs = (shape->length + COLS - 1) / COLS * (COLS / 2);
  const int64_t panels = (shape->rows + ROWS - 1) / ROWS, all = shape->groups * shape->heads;
#pragma omp parallel if (all * shape->rows > 512)
  {
#pragma omp for collapse(2) schedule(static)
    for (int64_t group = 0; group < shape->groups; ++group)
      for (int64_t pair = 0; pair < pairs; ++pair)
        interleave(value + group * shape->value_group, shape->value_row, shape->length,
                   shape->width, 2 * pair, scratch + (group * pairs + pair) * 2 * shape->width);
#pragma omp for collapse(2) schedule(dynamic, 8)
    for (int64_t head = 0; head < all; ++head)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t group = head / shape->heads, first = panel * ROWS;
        Operands with = *of_map;
        with.values = scratch + group * pairs * 2 * shape->width;
        head_times_values(&with, head * shape->panels_per_head + panel,
                          out + group * shape->out_group + head % shape->heads * shape->out_head +
                              first * shape->out_row,
                          shape->out_row, shape->rows - first < ROWS ? shape->rows - first : ROWS);
      }
  }
}
#endif

PyDoc_STRVAR(supported_doc, "supported() -> bool: whether this CPU has the instructions.");
static PyObject *py_supported(PyObject *self, PyObject *unused) {
  return PyBool_FromLong(SUPPORTED);
}

PyDoc_STRVAR(multiply_doc,
             "multiply(cells, scales, columns, panels, value, scratch, out, groups, heads, "
             "panels_per_head, rows, length, width, value_group, value_row, out_group, out_head, "
             "out_row): the first rows of a map times values, for all of its groups. Addresses, "
             "sizes, and strides in numbers.");
static PyObject *py_multiply(PyObject *self, PyObject *args) {
  unsigned long long cells, scales, columns, panels, value, scratch, out;
  long long groups, heads, panels_per_head, rows, length, width;
  long long value_group, value_row, out_group, out_head, out_row;
  if (!PyArg_ParseTuple(args, "KKKKKKKLLLLLLLLLLL", &cells, &scales, &columns, &panels, &value,
                        &scratch, &out, &groups, &heads, &panels_per_head, &rows, &length, &width,
                        &value_group, &value_row, &out_group, &out_head, &out_row))
    return NULL;
#if defined(TARGET)
  Operands of_map = {(const uint8_t *)(uintptr_t)cells,    (const uint16_t *)(uintptr_t)scales,
                     (const uint16_t *)(uintptr_t)columns, (const uint32_t *)(uintptr_t)panels,
                     NULL,                                 width};
  Shape shape = {groups,      heads,     panels_per_head, rows,     length, width,
                 value_group, value_row, out_group,       out_head, out_row};
  Py_BEGIN_ALLOW_THREADS;
  multiply(&of_map, (const uint16_t *)(uintptr_t)value, (uint16_t *)(uintptr_t)scratch,
           (uint16_t *)(uintptr_t)out, &shape);
  Py_END_ALLOW_THREADS;
#endif
  Py_RETURN_NONE;
}

PyDoc_STRVAR(tile_doc,
             "tile(probs, heads, length, dropped, cells, scales, columns, counts, found): the tiles "
             "of heads float32 [heads, length, length], and how many each has, -1 without memory; "
             "addresses of room for all of every head.");
static PyObject *py_tile(PyObject *self, PyObject *args) {
  unsigned long long probs, cells, scales, columns, counts, found;
  long long heads, length;
  float dropped;
  if (!PyArg_ParseTuple(args, "KLLfKKKKK", &probs, &heads, &length, &dropped, &cells, &scales,
                        &columns, &counts, &found))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  tile_heads((const float *)(uintptr_t)probs, heads, length, dropped, (uint8_t *)(uintptr_t)cells,
             (uint16_t *)(uintptr_t)scales, (uint16_t *)(uintptr_t)columns,
             (int64_t *)(uintptr_t)counts, (int64_t *)(uintptr_t)found);
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyDoc_STRVAR(prune_doc,
             "prune(cells, scales, columns, panels, count, wide, dropped) -> int: drop tiles of "
             "`count` panels in place, each of at most `wide`; how many are left.");
static PyObject *py_prune(PyObject *self, PyObject *args) {
  unsigned long long cells, scales, columns, panels;
  long long count, wide, left;
  float dropped;
  if (!PyArg_ParseTuple(args, "KKKKLLf", &cells, &scales, &columns, &panels, &count, &wide,
                        &dropped))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  left = prune((uint8_t *)(uintptr_t)cells, (uint16_t *)(uintptr_t)scales,
               (uint16_t *)(uintptr_t)columns, (uint32_t *)(uintptr_t)panels, count, wide, dropped);
  Py_END_ALLOW_THREADS;
  return left < 0 ? PyErr_NoMemory() : PyLong_FromLongLong(left);
}

PyDoc_STRVAR(sound_doc,
             "sound(columns, scales, panels, count, panels_per_head, length, causal, largest) -> "
             "bool: whether the tiles of `count` panels may be multiplied; addresses of tensors "
             "that hold as many tiles as the ascending panels say.");
static PyObject *py_sound(PyObject *self, PyObject *args) {
  unsigned long long columns, scales, panels;
  long long count, panels_per_head, length;
  int causal, fine;
  unsigned short largest;
  if (!PyArg_ParseTuple(args, "KKKLLLpH", &columns, &scales, &panels, &count, &panels_per_head,
                        &length, &causal, &largest))
    return NULL;
  Py_BEGIN_ALLOW_THREADS;
  fine = sound((const uint16_t *)(uintptr_t)columns, (const uint16_t *)(uintptr_t)scales,
               (const uint32_t *)(uintptr_t)panels, count, panels_per_head, length, causal, largest);
  Py_END_ALLOW_THREADS;
  return PyBool_FromLong(fine);
}

static PyMethodDef methods[] = {
    {"supported", py_supported, METH_NOARGS, supported_doc},
    {"multiply", py_multiply, METH_VARARGS, multiply_doc},
    {"tile", py_tile, METH_VARARGS, tile_doc},
    {"prune", py_prune, METH_VARARGS, prune_doc},
    {"sound", py_sound, METH_VARARGS, sound_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_tiles", "Products of tiled attention maps with values.", -1, methods,
};

PyMODINIT_FUNC PyInit__tiles(void) { return PyModule_Create(&module); }
