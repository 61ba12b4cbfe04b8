/* Instructions as C reads them.
 *
 * `isa.h` is generated from isa.py and parameters.py: for each field its first bit, its width and its sign.
 */

#pragma once

#include <stdint.h>

#include "isa.h"

enum { LOAD, GEMM, POST, STORE, UNITS };
enum { INPUTS, WEIGHTS, SIDE, PARAMETERS };
enum { ACCUMULATORS, IN_SIDE };
enum { LARGEST, SUM };

typedef struct {
  int64_t rows, columns, lanes, input_rows, weight_rows, accumulator_rows, side_rows, output_rows, parameter_rows, queue;
} Design;

typedef struct {
  uint64_t low, high;
} Instruction;

static int64_t bits(uint64_t low, uint64_t high, int at, int width, int sign) {
  uint64_t value = at >= 64 ? high >> (at - 64) : low >> at;
  if (at < 64 && at + width > 64) value |= high << (64 - at);
  if (width < 64) value &= (UINT64_C(1) << width) - 1;
  return sign && value >> (width - 1) ? (int64_t)(value | ~((UINT64_C(1) << width) - 1)) : (int64_t)value;
}

#define FIELD(one, field) bits((one)->low, (one)->high, field##_AT, field##_WIDTH, field##_SIGN)
#define WORD(word, field) bits(word, 0, field##_AT, field##_WIDTH, field##_SIGN)

static int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }
