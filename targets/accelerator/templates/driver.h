// Runs a network's layers on the accelerator. Nothing is allocated; the host may be of either byte order.
#pragma once
#include <stddef.h>
#include <stdint.h>

// How the host reaches the accelerator and its memory, in words of 64 bits. Each answers 0, or an error of its own.
struct taskpress_board {
  void *context;
  int (*write)(void *context, uint32_t address, const uint64_t *words, uint32_t count);
  int (*read)(void *context, uint32_t address, uint64_t *words, uint32_t count);
  // Gives the circuit `address` and `count`, raises `start` for a cycle, and waits until `idle` is high again.
  int (*execute)(void *context, uint32_t address, uint32_t count);
};

// A tensor that the host gives or takes: int8 (channels, height, width), whose real values are (q - zero) * scale.
struct taskpress_port {
  const char *name;
  uint32_t channels, height, width;
  float scale;
  int32_t zero;
  uint32_t address;                                // of its first word in memory
  uint32_t stored_channels, stored_height, stored_width;
  const uint32_t *order;                           // NULL, or of each stored channel its place in a window, as below
  uint32_t size[2], step[2], spread[2], pad[2];    // of windows: lines, columns; the frame's top and left
  int8_t fill;
};

struct taskpress_run {
  uint32_t address, instructions;
  uint32_t inputs, outputs;
  const struct taskpress_port *input, *output;
};

// Puts the whole of board.image, `count` words, into memory. Once, before the first frame.
int taskpress_open(const struct taskpress_board *board, const uint64_t *image, uint32_t count);

// One run: writes the inputs, executes, reads the outputs. Runs go in their order; between them the host computes.
int taskpress_run(const struct taskpress_board *board, const struct taskpress_run *run, const int8_t *const *inputs,
                  int8_t *const *outputs);

int8_t taskpress_quantize(const struct taskpress_port *port, float value);
float taskpress_dequantize(const struct taskpress_port *port, int8_t value);
