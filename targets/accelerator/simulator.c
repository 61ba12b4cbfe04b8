/* The accelerator, instruction by instruction: what it answers, and when.
 *
 * Answers are those of executing the program in its order, which its tokens make those of the circuit. Times are the
 * circuit's, to the cycle, with a memory that answers each port after a fixed latency, a word in each cycle; every
 * number in the second half says how long a register or a buffer of circuit/ takes. With a bus that the ports share,
 * one word of any of them in each cycle, times are near the circuit's: instructions get its cycles in their order.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "instructions.h"

/* --- what it answers ------------------------------------------------------------------------------------------- */

typedef struct {
  Design d;
  int64_t blocks, groups;
  int8_t *inputs, *weights, *side, *outputs;
  uint64_t *parameters;
  int32_t *sums[2];
} Machine;

static void close_machine(Machine *m) {
  free(m->inputs), free(m->weights), free(m->side), free(m->outputs), free(m->parameters);
  free(m->sums[0]), free(m->sums[1]);
}

static int open_machine(Machine *m, const Design *d) {
  memset(m, 0, sizeof *m);
  m->d = *d, m->blocks = d->rows / d->columns, m->groups = d->columns / d->lanes;
  m->inputs = calloc(d->input_rows, d->rows), m->weights = calloc(d->weight_rows, d->columns);
  m->side = calloc(d->side_rows, d->columns), m->outputs = calloc(d->output_rows, d->columns);
  m->parameters = calloc(d->parameter_rows * d->lanes, 8);
  for (int bank = 0; bank < 2; bank++) m->sums[bank] = calloc(d->accumulator_rows * d->columns, 4);
  return m->inputs && m->weights && m->side && m->outputs && m->parameters && m->sums[0] && m->sums[1];
}

static int64_t entry_words(const Design *d, int64_t memory) { return memory == PARAMETERS ? d->lanes : d->columns / 8; }

static void load(Machine *m, const Instruction *one, const uint8_t *memory) {
  const int64_t kind = FIELD(one, LOAD_MEMORY), size = 8 * entry_words(&m->d, kind), pad = FIELD(one, LOAD_PAD);
  const int64_t top = FIELD(one, LOAD_TOP), ny = FIELD(one, LOAD_NY), bottom = FIELD(one, LOAD_BOTTOM);
  const int64_t left = FIELD(one, LOAD_LEFT), nx = FIELD(one, LOAD_NX), right = FIELD(one, LOAD_RIGHT);
  uint8_t *buffers[] = {(uint8_t *)m->inputs, (uint8_t *)m->weights, (uint8_t *)m->side, (uint8_t *)m->parameters};
  const int64_t row = kind == INPUTS ? m->d.rows : size, lane = kind == INPUTS ? FIELD(one, LOAD_LANE) * m->d.columns : 0;
  uint8_t *to = buffers[kind] + FIELD(one, LOAD_ROW) * row + lane;
  for (int64_t y = -top; y < ny + bottom; y++)
    for (int64_t x = -left; x < nx + right; x++, to += row) {
      const uint8_t *from = memory + 8 * (FIELD(one, LOAD_ADDRESS) + y * FIELD(one, LOAD_STRIDE)) + x * size;
      if (y < 0 || y >= ny || x < 0 || x >= nx) memset(to, (int)pad, size);
      else memcpy(to, from, size);
    }
}

static void gemm(Machine *m, const Instruction *one) {
  const int64_t rows = m->d.rows, columns = m->d.columns, ny = FIELD(one, GEMM_NY), nx = FIELD(one, GEMM_NX);
  const int64_t step_y = FIELD(one, GEMM_STEP_Y), step_x = FIELD(one, GEMM_STEP_X), clear = FIELD(one, GEMM_CLEAR);
  const int8_t *tile = m->weights + FIELD(one, GEMM_WEIGHTS) * columns;
  int32_t *sum = m->sums[FIELD(one, GEMM_BANK)] + FIELD(one, GEMM_ROW_OUT) * columns;
  for (int64_t y = 0; y < ny; y++)
    for (int64_t x = 0; x < nx; x++, sum += columns) {
      const int8_t *row = m->inputs + (FIELD(one, GEMM_ROW) + y * step_y + x * step_x) * rows;
      int32_t total[64] = {0};
      if (!clear) memcpy(total, sum, 4 * columns);
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) total[c] += (int32_t)row[r] * tile[r * columns + c];
      memcpy(sum, total, 4 * columns);
    }
}

static int64_t rounded(int64_t value, int64_t shift) {
  return (value + (INT64_C(1) << (shift - 1)) - 1 + (value >> shift & 1)) >> shift;  // halves to even
}

static int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value > high ? high : value < low ? low : value;
}

static void post(Machine *m, const Instruction *one) {
  const int64_t columns = m->d.columns, ny = FIELD(one, POST_NY), nx = FIELD(one, POST_NX);
  const int64_t source = FIELD(one, POST_SOURCE), add = FIELD(one, POST_ADD), line = FIELD(one, POST_LINE);
  const int64_t reduce = FIELD(one, POST_REDUCE);
  const int64_t height = FIELD(one, POST_WINDOW_Y), width = FIELD(one, POST_WINDOW_X);
  const uint64_t *header = m->parameters + FIELD(one, POST_PARAMETERS) * m->d.lanes, *channels = header + m->d.lanes;
  const int64_t zero = WORD(header[0], GRIDS_ZERO), low = WORD(header[0], GRIDS_LOW), high = WORD(header[0], GRIDS_HIGH);
  const int64_t other_zero = WORD(header[0], GRIDS_OTHER_ZERO), sum_zero = WORD(header[0], GRIDS_SUM_ZERO);
  const int64_t sum_low = WORD(header[0], GRIDS_SUM_LOW), sum_high = WORD(header[0], GRIDS_SUM_HIGH);
  const int64_t own = WORD(header[1], FACTORS_OWN), other = WORD(header[1], FACTORS_OTHER);
  const int64_t sum_shift = WORD(header[1], FACTORS_SUM_SHIFT);
  const int32_t *sums = m->sums[FIELD(one, POST_BANK)] + FIELD(one, POST_ROW) * columns;
  const int8_t *side = m->side + FIELD(one, POST_SIDE) * columns;
  int8_t *to = m->outputs + FIELD(one, POST_ROW_OUT) * columns;
  for (int64_t y = 0; y < ny; y++)
    for (int64_t x = 0; x < nx; x++) {
      const int64_t window = (y * FIELD(one, POST_STEP_Y) + x * FIELD(one, POST_STEP_X)) * columns;
      for (int64_t c = 0; c < columns; c++) {
        int64_t value = reduce == SUM ? 0 : INT32_MIN;
        for (int64_t wy = 0; wy < height; wy++)
          for (int64_t wx = 0; wx < width; wx++) {
            const int64_t at = window + (wy * line + wx) * columns + c;
            const int64_t seen = source == ACCUMULATORS ? sums[at] : side[at] * (1 << FRACTION_BITS);
            value = reduce == SUM ? value + seen : largest(value, seen);
          }
        value = (value + WORD(channels[c], CHANNEL_BIAS)) * WORD(channels[c], CHANNEL_MULTIPLIER);
        int64_t found = clamped(rounded(value, WORD(channels[c], CHANNEL_SHIFT)) + zero, low, high);
        if (add) {
          const int64_t total = (found - zero) * own + (side[window + c] - other_zero) * other;
          found = clamped(rounded(total, sum_shift) + sum_zero, sum_low, sum_high);
        }
        *to++ = (int8_t)found;
      }
    }
}

static void store(Machine *m, const Instruction *one, uint8_t *memory) {
  const int64_t size = FIELD(one, STORE_NX) * m->d.columns;
  const int8_t *from = m->outputs + FIELD(one, STORE_ROW) * m->d.columns;
  for (int64_t y = 0; y < FIELD(one, STORE_NY); y++, from += size)
    memcpy(memory + 8 * (FIELD(one, STORE_ADDRESS) + y * FIELD(one, STORE_STRIDE)), from, size);
}

/* --- and when ---------------------------------------------------------------------------------------------------- */

enum { BURST = 32, BURSTS = 4, AHEAD = 4, EARLY = 4, PICK = 6, WRITE = 27, DEEPEST = 64, TOKENS = 256 };

/* The bus of a memory whose ports share it: for each cycle, 0 or how far on a free one may be looked for. */
typedef struct {
  int32_t *skip;
  int64_t size;
  int full;
} Bus;

/* The first free cycle from `at` on, which is taken; `at` itself where the ports have a bus each. */
static int64_t transfer(Bus *b, int64_t at) {
  if (!b->size) return at;
  int64_t free = at;
  for (;;) {
    if (free + 1 >= b->size) {
      int32_t *more = realloc(b->skip, 2 * (free + 2) * sizeof *more);
      if (!more) return b->full = 1, at;
      memset(more + b->size, 0, (2 * (free + 2) - b->size) * sizeof *more);
      b->skip = more, b->size = 2 * (free + 2);
    }
    if (!b->skip[free]) break;
    free += b->skip[free];
  }
  for (int64_t seen = at, next; seen < free; seen = next) next = seen + b->skip[seen], b->skip[seen] = (int32_t)(free + 1 - seen);
  b->skip[free] = 1;
  return free;
}

/* A buffered queue: when an item can be read, and when there is room for the next. */
typedef struct {
  int64_t readable[DEEPEST], depth, count, popped;
} Queue;

static int64_t room(const Queue *q) { return q->count < q->depth - 1 ? 0 : q->readable[q->count % (q->depth - 1)]; }

static int64_t enqueue(Queue *q, int64_t at) {
  const int64_t readable = largest(at + 2, q->popped + 1);
  q->readable[q->count++ % (q->depth - 1)] = readable;
  return readable;
}

typedef struct {
  int64_t at[TOKENS], given, taken;
} Tokens;

typedef struct {
  Design d;
  Bus bus;
  int64_t latency, depth;
  int64_t word, asked, come[BURST], popped, taken, dispatched, freed[BURSTS], bursts;
  Queue queues[UNITS], ahead;
  Tokens tokens[UNITS][UNITS];
  int64_t free[UNITS], idle[UNITS], written, arrived, multiplied, read;
} Clock;

static void open_clock(Clock *k, const Design *d, int64_t latency) {
  memset(k, 0, sizeof *k);
  k->d = *d, k->latency = latency, k->depth = 5, k->ahead.depth = AHEAD, k->ahead.popped = -1;
  for (int64_t rows = 1; rows < d->rows; rows *= 2) k->depth++;
  for (int unit = 0; unit < UNITS; unit++) k->queues[unit].depth = d->queue, k->queues[unit].popped = -1;
}

/* The first cycle in which the program's next word can be read. */
static int64_t arrives(Clock *k) {
  const int64_t number = k->word++ % BURST;
  if (number == 0) {
    const int64_t freed = k->bursts < BURSTS ? 0 : k->freed[k->bursts % BURSTS] + 1;
    k->asked = largest(k->asked + 1, freed), k->bursts++;
    int64_t before = k->come[BURST - 1];
    for (int word = 0; word < BURST; word++)
      before = k->come[word] = transfer(&k->bus, largest(k->asked + k->latency, before + 1));
  }
  return k->come[number] + 2;
}

/* The cycle in which the program's next word goes into its half of an instruction, at the earliest then. */
static int64_t taken(Clock *k, int64_t earliest) {
  k->popped = largest(arrives(k), largest(k->popped + 1, k->taken));
  if (k->word % BURST == 0) k->freed[(k->bursts - 1) % BURSTS] = k->popped;
  return k->taken = largest(earliest, largest(k->popped, k->taken) + 1);
}

/* The cycle in which an instruction goes to its queue, which has room then. */
static int64_t dispatch(Clock *k, int64_t has_room) {
  taken(k, 0);
  return k->dispatched = largest(taken(k, k->dispatched + 1) + 1, has_room);
}

static int64_t loaded(Clock *k, const Instruction *one, int64_t begun) {
  const int64_t ny = FIELD(one, LOAD_NY), left = FIELD(one, LOAD_LEFT), right = FIELD(one, LOAD_RIGHT);
  const int64_t words = FIELD(one, LOAD_NX) * entry_words(&k->d, FIELD(one, LOAD_MEMORY));
  const int64_t frame = left + FIELD(one, LOAD_NX) + right;
  int64_t at = k->ahead.popped = largest(enqueue(&k->ahead, begun), k->written);
  k->free[LOAD] = largest(begun + ny + 1, room(&k->ahead));
  at += 1 + FIELD(one, LOAD_TOP) * frame;
  for (int64_t y = 0; y < ny; y++) {
    int64_t earliest = begun + 1 + y + k->latency;
    if (k->bus.size) {
      at += left;
      for (int64_t word = 0; word < words; word++) at = transfer(&k->bus, largest(at, earliest)) + 1;
      at += right;
      continue;
    }
    earliest = largest(earliest, k->arrived + 1);
    k->arrived = earliest + words - 1;
    at = largest(at + left, earliest) + words + right;
  }
  k->written = at + FIELD(one, LOAD_BOTTOM) * frame;
  k->idle[LOAD] = k->written + 2;
  return k->written + 1;
}

static int64_t multiplied(Clock *k, const Instruction *one, int64_t begun, int64_t bank) {
  const int64_t swap = largest(begun + k->d.rows + 3, largest(k->multiplied, bank + 1));
  k->multiplied = swap + FIELD(one, GEMM_NY) * FIELD(one, GEMM_NX), k->free[GEMM] = swap + 1;
  k->idle[GEMM] = k->multiplied + k->depth + 2;
  return k->multiplied + k->depth + 1;
}

static int64_t requantized(Clock *k, const Instruction *one, int64_t begun) {
  const int64_t groups = k->d.columns / k->d.lanes, area = FIELD(one, POST_WINDOW_Y) * FIELD(one, POST_WINDOW_X);
  const int64_t last = begun + 2 + (FIELD(one, POST_NY) * FIELD(one, POST_NX) - 1) * largest(groups, area) + area - 1;
  const int64_t end = last + PICK + groups - 1, done = end + WRITE + 1;
  k->free[POST] = end - 2, k->idle[POST] = done + 1, k->read = last + 1;
  return done;
}

static int64_t stored(Clock *k, const Instruction *one, int64_t begun) {
  const int64_t words = FIELD(one, STORE_NX) * k->d.columns / 8;
  int64_t at = begun + 4;
  for (int64_t y = 0; y < FIELD(one, STORE_NY); y++) {
    at += 1;
    if (k->bus.size)
      for (int64_t word = 0; word < words; word++) at = transfer(&k->bus, at) + 1;
    else at += words;
  }
  const int64_t done = at + k->latency;
  k->free[STORE] = k->idle[STORE] = done + 1;
  return done;
}

/* 0, or -1 where an instruction waits for a token that was not given. */
static int tick(Clock *k, const Instruction *one, int64_t *begun, int64_t *done) {
  const int unit = (int)FIELD(one, LOAD_OPCODE);
  const int64_t waits = FIELD(one, LOAD_WAITS), signals = FIELD(one, LOAD_SIGNALS);
  Queue *q = &k->queues[unit];
  int64_t ready = enqueue(q, dispatch(k, room(q)));
  int64_t bank = 0;
  ready = largest(ready, largest(k->free[unit], q->popped + 1));
  for (int giver = 0; giver < UNITS; giver++)
    if (waits >> giver & 1) {
      Tokens *t = &k->tokens[giver][unit];
      if (t->taken == t->given) return -1;
      int64_t *until = unit == GEMM && giver == POST ? &bank : &ready;
      *until = largest(*until, t->at[t->taken++ % TOKENS]);
    }
  *begun = q->popped = ready + 1;
  *done = unit == LOAD   ? loaded(k, one, *begun)
          : unit == GEMM ? multiplied(k, one, *begun, bank)
          : unit == POST ? requantized(k, one, *begun)
                         : stored(k, one, *begun);
  for (int taker = 0; taker < UNITS; taker++)
    if (signals >> taker & 1) {
      Tokens *t = &k->tokens[unit][taker];
      const int64_t given = unit == POST && taker == GEMM ? k->read : unit == GEMM && taker == POST ? *done - EARLY : *done;
      t->at[t->given++ % TOKENS] = given + 1;
    }
  return 0;
}

/* Cycles from the start until all is done; -1 where an instruction waits for ever, -2 without memory of its own.
 *
 * memory: changed as the program says; where it is NULL nothing is computed, and only the time is told.
 * shared: whether the memory's ports share a bus.
 * times: where not NULL, for each instruction the cycle in which it left its queue and that in which it was done.
 */
int64_t run(const int64_t *design, uint8_t *memory, const Instruction *program, int64_t count, int64_t latency,
            int shared, int64_t *times) {
  Design d;
  memcpy(&d, design, sizeof d);
  Clock k;
  open_clock(&k, &d, latency);
  if (shared) k.bus.size = 1 << 16, k.bus.skip = calloc(k.bus.size, sizeof *k.bus.skip), k.bus.full = !k.bus.skip;
  Machine m = {0};
  if (k.bus.full || (memory && !open_machine(&m, &d))) return close_machine(&m), free(k.bus.skip), -2;
  int64_t cycles = 0;
  for (int64_t i = 0; i < count && cycles >= 0; i++) {
    const Instruction *one = program + i;
    int64_t begun, done;
    if (tick(&k, one, &begun, &done)) cycles = -1;
    if (k.bus.full) cycles = -2;
    if (times) times[2 * i] = begun, times[2 * i + 1] = done;
    if (!memory || cycles < 0) continue;
    switch (FIELD(one, LOAD_OPCODE)) {
      case LOAD: load(&m, one, memory); break;
      case GEMM: gemm(&m, one); break;
      case POST: post(&m, one); break;
      default: store(&m, one, memory);
    }
  }
  if (memory) close_machine(&m);
  free(k.bus.skip);
  if (cycles < 0) return cycles;
  cycles = k.dispatched + 1;
  for (int unit = 0; unit < UNITS; unit++) cycles = largest(cycles, k.idle[unit]);
  return cycles;
}
