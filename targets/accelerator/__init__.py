"""An int8 accelerator for FPGAs: its instructions, what they compute, how long they take, and its circuit."""
