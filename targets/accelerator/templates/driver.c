#include "driver.h"

#include <math.h>

#include "network.h"

// The value that lies at a place of a stored tensor.
static int8_t stored(const struct taskpress_port *port, const int8_t *values, uint32_t k, uint32_t y, uint32_t x) {
  if (k >= port->stored_channels) return 0;
  if (port->order == NULL) return values[(k * port->height + y) * port->width + x];
  const uint32_t taps = port->size[0] * port->size[1], tap = port->order[k] % taps;
  const int64_t line = (int64_t)y * port->step[0] + (int64_t)(tap / port->size[1]) * port->spread[0] - port->pad[0];
  const int64_t column = (int64_t)x * port->step[1] + (int64_t)(tap % port->size[1]) * port->spread[1] - port->pad[1];
  if (line < 0 || column < 0 || line >= port->height || column >= port->width) return port->fill;
  return values[(port->order[k] / taps * port->height + (uint32_t)line) * port->width + (uint32_t)column];
}

static int give(const struct taskpress_board *board, const struct taskpress_port *port, const int8_t *values) {
  uint64_t words[TASKPRESS_COLUMNS / 8];
  uint32_t address = port->address;
  for (uint32_t first = 0; first < port->stored_channels; first += TASKPRESS_COLUMNS)
    for (uint32_t y = 0; y < port->stored_height; y++)
      for (uint32_t x = 0; x < port->stored_width; x++, address += TASKPRESS_COLUMNS / 8) {
        for (uint32_t w = 0; w < TASKPRESS_COLUMNS / 8; w++) words[w] = 0;
        for (uint32_t k = 0; k < TASKPRESS_COLUMNS; k++)
          words[k / 8] |= (uint64_t)(uint8_t)stored(port, values, first + k, y, x) << 8 * (k % 8);
        const int error = board->write(board->context, address, words, TASKPRESS_COLUMNS / 8);
        if (error) return error;
      }
  return 0;
}

static int take(const struct taskpress_board *board, const struct taskpress_port *port, int8_t *values) {
  uint64_t words[TASKPRESS_COLUMNS / 8];
  uint32_t address = port->address;
  for (uint32_t first = 0; first < port->channels; first += TASKPRESS_COLUMNS)
    for (uint32_t y = 0; y < port->height; y++)
      for (uint32_t x = 0; x < port->width; x++, address += TASKPRESS_COLUMNS / 8) {
        const int error = board->read(board->context, address, words, TASKPRESS_COLUMNS / 8);
        if (error) return error;
        for (uint32_t k = 0; k < TASKPRESS_COLUMNS && first + k < port->channels; k++)
          values[((first + k) * port->height + y) * port->width + x] = (int8_t)(words[k / 8] >> 8 * (k % 8));
      }
  return 0;
}

int taskpress_open(const struct taskpress_board *board, const uint64_t *image, uint32_t count) {
  return board->write(board->context, 0, image, count);
}

int taskpress_run(const struct taskpress_board *board, const struct taskpress_run *run, const int8_t *const *inputs,
                  int8_t *const *outputs) {
  int error = 0;
  for (uint32_t k = 0; k < run->inputs && !error; k++) error = give(board, &run->input[k], inputs[k]);
  if (!error) error = board->execute(board->context, run->address, run->instructions);
  for (uint32_t k = 0; k < run->outputs && !error; k++) error = take(board, &run->output[k], outputs[k]);
  return error;
}

int8_t taskpress_quantize(const struct taskpress_port *port, float value) {
  const float steps = nearbyintf(value / port->scale) + (float)port->zero;  // halves to even, as the reference does
  return (int8_t)(steps < -128 ? -128 : steps > 127 ? 127 : steps);
}

float taskpress_dequantize(const struct taskpress_port *port, int8_t value) {
  return (float)(value - port->zero) * port->scale;
}
