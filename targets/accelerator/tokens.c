/* Tokens for a program of which only the cycles matter, such as one that is tried for its speed.
 *
 * Puts them where `tokens.synchronised` does, by the same clocks, about a hundred times faster. Programs that are
 * deployed get theirs there, and are proved by `tokens.check`.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "instructions.h"

enum { SUMS_READ = UNITS, EVENTS };
enum { SUMS0 = PARAMETERS + 1, SUMS1, OUTPUTS, WORDS, BUFFERS };
enum { LARGEST_COUNT = 63, DEEPEST = 4, MOST = 4 };

typedef int32_t Clock[EVENTS];

/* Rows of a buffer: loops of so many turns with a step each, one inside the other, from the first row on. */
typedef struct {
  int buffer;
  int64_t first, turns[DEEPEST], step[DEEPEST];
} Rows;

typedef struct {
  Design d;
  int64_t sizes[BUFFERS];
  Clock *read[BUFFERS], *written[BUFFERS], known[UNITS];
  Clock *given[UNITS];       /* of each instruction of a unit, what the unit knew when it was done */
  int64_t *at[UNITS];        /* its position in the program */
  int64_t *takers[UNITS][UNITS], taken[UNITS][UNITS], count[UNITS];
} State;

static Rows rows_of(int buffer, int64_t first) {
  Rows r = {buffer, first, {1, 1, 1, 1}, {0, 0, 0, 0}};
  return r;
}

static Rows line(int buffer, int64_t first, int64_t turns) {
  Rows r = rows_of(buffer, first);
  r.turns[3] = turns, r.step[3] = 1;
  return r;
}

static Rows words(int64_t address, int64_t ny, int64_t stride, int64_t length) {
  Rows r = line(WORDS, address, length);
  r.turns[2] = ny, r.step[2] = stride;
  return r;
}

static Rows writes(const Design *d, const Instruction *one) {
  const int64_t entries = (FIELD(one, LOAD_TOP) + FIELD(one, LOAD_NY) + FIELD(one, LOAD_BOTTOM)) *
                          (FIELD(one, LOAD_LEFT) + FIELD(one, LOAD_NX) + FIELD(one, LOAD_RIGHT));
  const int kind = (int)FIELD(one, LOAD_MEMORY);
  switch (FIELD(one, LOAD_OPCODE)) {
    case LOAD: {
      if (kind != INPUTS) return line(kind, FIELD(one, LOAD_ROW), entries);
      Rows r = line(INPUTS, FIELD(one, LOAD_ROW) * (d->rows / d->columns) + FIELD(one, LOAD_LANE), entries);
      return r.step[3] = d->rows / d->columns, r;
    }
    case GEMM:
      return line(SUMS0 + (int)FIELD(one, GEMM_BANK), FIELD(one, GEMM_ROW_OUT), FIELD(one, GEMM_NY) * FIELD(one, GEMM_NX));
    case POST: return line(OUTPUTS, FIELD(one, POST_ROW_OUT), FIELD(one, POST_NY) * FIELD(one, POST_NX));
    default:
      return words(FIELD(one, STORE_ADDRESS), FIELD(one, STORE_NY), FIELD(one, STORE_STRIDE),
                   FIELD(one, STORE_NX) * (d->columns / 8));
  }
}

/* How many it writes into `found`. */
static int reads(const Design *d, const Instruction *one, Rows *found) {
  const int64_t blocks = d->rows / d->columns;
  switch (FIELD(one, LOAD_OPCODE)) {
    case LOAD: {
      const int64_t entry = FIELD(one, LOAD_MEMORY) == PARAMETERS ? d->lanes : d->columns / 8;
      found[0] = words(FIELD(one, LOAD_ADDRESS), FIELD(one, LOAD_NY), FIELD(one, LOAD_STRIDE), FIELD(one, LOAD_NX) * entry);
      return 1;
    }
    case GEMM: {
      Rows r = line(INPUTS, FIELD(one, GEMM_ROW) * blocks, blocks);
      r.turns[1] = FIELD(one, GEMM_NY), r.step[1] = FIELD(one, GEMM_STEP_Y) * blocks;
      r.turns[2] = FIELD(one, GEMM_NX), r.step[2] = FIELD(one, GEMM_STEP_X) * blocks;
      found[0] = r, found[1] = line(WEIGHTS, FIELD(one, GEMM_WEIGHTS), d->rows), found[2] = writes(d, one);
      return FIELD(one, GEMM_CLEAR) ? 2 : 3;
    }
    case POST: {
      int count = 0;
      Rows r = rows_of(SIDE, FIELD(one, POST_SIDE));
      r.turns[0] = FIELD(one, POST_NY), r.step[0] = FIELD(one, POST_STEP_Y);
      r.turns[1] = FIELD(one, POST_NX), r.step[1] = FIELD(one, POST_STEP_X);
      r.turns[2] = FIELD(one, POST_WINDOW_Y), r.step[2] = FIELD(one, POST_LINE);
      r.turns[3] = FIELD(one, POST_WINDOW_X), r.step[3] = 1;
      found[count++] = line(PARAMETERS, FIELD(one, POST_PARAMETERS), 1 + d->columns / d->lanes);
      if (FIELD(one, POST_SOURCE) == IN_SIDE || FIELD(one, POST_ADD)) found[count++] = r;
      r.buffer = SUMS0 + (int)FIELD(one, POST_BANK), r.first = FIELD(one, POST_ROW);
      if (FIELD(one, POST_SOURCE) == ACCUMULATORS) found[count++] = r;
      return count;
    }
    default:
      found[0] = line(OUTPUTS, FIELD(one, STORE_ROW), FIELD(one, STORE_NY) * FIELD(one, STORE_NX));
      return 1;
  }
}

static int of_sums(const Rows *r) { return r->buffer == SUMS0 || r->buffer == SUMS1; }

/* The latest of each event in `table` over the rows (`mark` 0), or event `mark - 1` of all set to `number`. */
static void visit(Clock *table, const Rows *given, int32_t *latest, int mark, int32_t number) {
  const Rows whole = line(given->buffer, 0, 1), *r = of_sums(given) ? &whole : given; /* a bank counts as one row */
  for (int64_t a = 0; a < r->turns[0]; a++)
    for (int64_t b = 0; b < r->turns[1]; b++)
      for (int64_t c = 0; c < r->turns[2]; c++) {
        Clock *row = table + r->first + a * r->step[0] + b * r->step[1] + c * r->step[2];
        for (int64_t e = 0; e < r->turns[3]; e++, row += r->step[3])
          if (mark) (*row)[mark - 1] = number;
          else
            for (int event = 0; event < EVENTS; event++)
              if ((*row)[event] > latest[event]) latest[event] = (*row)[event];
      }
}

static int inside(const State *s, const Rows *r) {
  int64_t last = r->first;
  for (int k = 0; k < DEEPEST; k++) last += (r->turns[k] - 1) * r->step[k];
  return last < s->sizes[r->buffer];
}

static int giver_of(int event) { return event == SUMS_READ ? POST : event; }

/* What a unit knows once it has taken a token over. */
static void learn(State *s, int unit, int giver, const int32_t *clock) {
  for (int event = 0; event < EVENTS; event++)
    if ((giver != POST || unit != GEMM || event == SUMS_READ) && clock[event] > s->known[unit][event])
      s->known[unit][event] = clock[event];
}

/* Takers of this pair's tokens that come after a position. */
static int64_t takers_after(const State *s, int giver, int unit, int64_t position) {
  int64_t count = 0;
  for (int64_t k = s->taken[giver][unit]; k-- && s->takers[giver][unit][k] > position;) count++;
  return count;
}

static void wait_for(State *s, Instruction *program, int64_t position, int unit, const int32_t *needed) {
  int order[EVENTS];
  for (int event = 0; event < EVENTS; event++) { /* the latest first, as what one token brings may spare another */
    int k = event;
    for (; k && needed[order[k - 1]] < needed[event]; k--) order[k] = order[k - 1];
    order[k] = event;
  }
  for (int k = 0; k < EVENTS; k++) {
    const int event = order[k], giver = giver_of(event);
    int64_t number = needed[event];
    if (number <= s->known[unit][event]) continue;
    if (takers_after(s, giver, unit, s->at[giver][number - 1]) >= LARGEST_COUNT) number = s->count[giver];
    s->takers[giver][unit][s->taken[giver][unit]++] = position;
    program[s->at[giver][number - 1]].low |= UINT64_C(1) << unit << LOAD_SIGNALS_AT;
    program[position].low |= UINT64_C(1) << giver << LOAD_WAITS_AT;
    learn(s, unit, giver, s->given[giver][number - 1]);
  }
}

static int close_state(State *s, int result) {
  for (int buffer = 0; buffer < BUFFERS; buffer++) free(s->read[buffer]), free(s->written[buffer]);
  for (int unit = 0; unit < UNITS; unit++) {
    free(s->given[unit]), free(s->at[unit]);
    for (int taker = 0; taker < UNITS; taker++) free(s->takers[unit][taker]);
  }
  return result;
}

static int open_state(State *s, const int64_t *design, int64_t memory, int64_t count) {
  memset(s, 0, sizeof *s);
  memcpy(&s->d, design, sizeof s->d);
  const Design *d = &s->d;
  const int64_t sizes[BUFFERS] = {d->input_rows * (d->rows / d->columns), d->weight_rows, d->side_rows, d->parameter_rows,
                                  d->accumulator_rows, d->accumulator_rows, d->output_rows, memory};
  memcpy(s->sizes, sizes, sizeof sizes);
  int all = 1;
  for (int buffer = 0; buffer < BUFFERS; buffer++) {
    all = all && (s->read[buffer] = calloc(sizes[buffer] + 1, sizeof(Clock)));
    all = all && (s->written[buffer] = calloc(sizes[buffer] + 1, sizeof(Clock)));
  }
  for (int unit = 0; unit < UNITS; unit++) {
    all = all && (s->given[unit] = calloc(count + 1, sizeof(Clock)));
    all = all && (s->at[unit] = calloc(count + 1, sizeof(int64_t)));
    for (int taker = 0; taker < UNITS; taker++)
      all = all && (s->takers[unit][taker] = calloc(EVENTS * (count + 1), sizeof(int64_t)));
  }
  return all;
}

/* Put tokens into the program; -1 where an instruction leaves a buffer or the memory, -2 without memory of its own.
 *
 * memory: its size in words.
 */
int synchronise(const int64_t *design, int64_t memory, Instruction *program, int64_t count) {
  State s;
  if (!open_state(&s, design, memory, count)) return close_state(&s, -2);
  for (int64_t position = 0; position < count; position++) {
    const Instruction *one = program + position;
    const int unit = (int)FIELD(one, LOAD_OPCODE);
    Rows from[MOST], to = writes(&s.d, one);
    const int sources = reads(&s.d, one, from);
    Clock needed = {0};
    for (int k = 0; k < sources; k++) {
      if (!inside(&s, from + k)) return close_state(&s, -1);
      visit(s.written[from[k].buffer], from + k, needed, 0, 0);
    }
    if (!inside(&s, &to)) return close_state(&s, -1);
    visit(s.written[to.buffer], &to, needed, 0, 0), visit(s.read[to.buffer], &to, needed, 0, 0);
    for (int event = 0; event < EVENTS; event++)
      if (giver_of(event) == unit) needed[event] = 0;
    wait_for(&s, program, position, unit, needed);
    const int32_t number = ++s.known[unit][unit];
    if (unit == POST) s.known[POST][SUMS_READ]++;
    for (int k = 0; k < sources; k++)
      visit(s.read[from[k].buffer], from + k, NULL, 1 + (unit == POST && of_sums(from + k) ? SUMS_READ : unit), number);
    visit(s.written[to.buffer], &to, NULL, 1 + unit, number);
    memcpy(s.given[unit][s.count[unit]], s.known[unit], sizeof(Clock));
    s.at[unit][s.count[unit]++] = position;
  }
  return close_state(&s, 0);
}
