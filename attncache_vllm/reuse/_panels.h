/* SPDX-License-Identifier: Apache-2.0
 *
 * Panels of tiles: which of them are kept, and the numbers they are made of. See tiles.py for the
 * layout.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ROWS 4  /* of a tile */
#define COLS 32 /* of a tile */
#define LEAST 1e-6f

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define SUPPORTED                                                              \
  (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") && \
   __builtin_cpu_supports("avx512vl"))
#else
#define SUPPORTED 0
#endif

/* The next bfloat16 at or above a number that is not negative. */
static inline float rounded_up(float number) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  bits = (bits + 0xFFFF) & 0xFFFF0000u;
  memcpy(&number, &bits, sizeof bits);
  return number;
}

static inline uint16_t nearest_bfloat16(float number) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof bits);
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

typedef struct {
  float mass[ROWS], largest[ROWS];
  int kept;
} TileSums;

/* Decides which of a panel's `count` tiles are kept: the smallest go, as long as no row loses more
 * than `dropped` of what it has beside its largest probability. `grown` is what the rows of the rest
 * are scaled by to keep their sums. */
static inline void choose_kept(TileSums *sums, int64_t count, float dropped, int32_t *order,
                               float *worst, float *grown) {
  float whole[ROWS] = {0}, largest[ROWS] = {0}, left[ROWS] = {0}, gone = 0;
  int64_t seen = 0;
  for (int64_t tile = 0; tile < count; ++tile)
    for (int row = 0; row < ROWS; ++row) {
      whole[row] += sums[tile].mass[row];
      if (sums[tile].largest[row] > largest[row]) largest[row] = sums[tile].largest[row];
    }
  for (int64_t tile = 0; tile < count; ++tile) {
    worst[tile] = 0;
    for (int row = 0; row < ROWS; ++row) {
      float share = sums[tile].mass[row] / (whole[row] - largest[row] + LEAST);
      worst[tile] = share > worst[tile] ? share : worst[tile];
    }
    sums[tile].kept = worst[tile] > 0;
    /* What alone is too much to lose need not be in order: most tiles, where attention is broad. */
    if (!sums[tile].kept || worst[tile] > dropped) continue;
    int64_t place = seen++; /* insertion, the smallest first */
    for (; place > 0 && worst[order[place - 1]] > worst[tile]; --place)
      order[place] = order[place - 1];
    order[place] = (int32_t)tile;
  }
  for (int64_t place = 0; place < seen; ++place) {
    gone += worst[order[place]];
    if (gone > dropped) break;
    sums[order[place]].kept = 0;
  }
  for (int64_t tile = 0; tile < count; ++tile)
    if (sums[tile].kept)
      for (int row = 0; row < ROWS; ++row) left[row] += sums[tile].mass[row];
  for (int row = 0; row < ROWS; ++row) grown[row] = left[row] > 0 ? whole[row] / left[row] : 1;
}

/* Room to decide about the tiles of a panel, for at most so many; all NULL without memory. */
typedef struct {
  TileSums *sums;
  int32_t *order;
  float *worst;
} Room;

static inline int make_room(Room *room, int64_t tiles) {
  room->sums = malloc(tiles * sizeof *room->sums);
  room->order = malloc(tiles * sizeof *room->order);
  room->worst = malloc(tiles * sizeof *room->worst);
  return room->sums && room->order && room->worst;
}

static inline void free_room(Room *room) {
  free(room->sums);
  free(room->order);
  free(room->worst);
}
