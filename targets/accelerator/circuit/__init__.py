"""The accelerator's circuit, in Amaranth: four units with their queues, the buffers between them, and their tokens.

Rules that keep it fast on an FPGA: loops count down and their last turn is a register; what a block memory answers
goes into a register before anything is computed of it; an instruction starts by a register, never by a comparison.
"""
