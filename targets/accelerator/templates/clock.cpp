// Gives the testbench its clock until it says that it is done.

#include "Vtestbench.h"
#include "verilated.h"

int main(int count, char** arguments) {
  VerilatedContext context;
  context.commandArgs(count, arguments);
  Vtestbench testbench(&context);
  while (!context.gotFinish()) {
    testbench.clk = !testbench.clk;
    testbench.eval();
    context.timeInc(1);
  }
  return 0;
}
