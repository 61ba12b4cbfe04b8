// Replays a recorded frame of one run: memory before it, the program, memory after it, and its cycles.
//
//     +run=run0 +instructions=N +cycles=N
//
// The memory answers each port after LATENCY cycles, a word in each, as the cycle model assumes.

`include "sizes.vh"

module testbench (input clk);
  reg [63:0] code[0:2*`INSTRUCTIONS-1], memory[0:`WORDS-1], expected[0:`WORDS-1];
  reg [8*64-1:0] run;
  integer instructions, cycles, wrong, k;
  reg ready = 0, start = 0;
  longint now = -2;

  wire idle, program_asked, program_taken, read_asked, read_taken, write_asked, write_given;
  wire [45:0] program_request, read_request, write_request;
  wire [63:0] write_word;
  reg program_there = 0, read_there = 0, write_done = 0;
  reg [63:0] program_word = 0, read_word = 0;

  longint program_due[$], read_due[$], done_due[$], program_last = 0, read_last = 0, done_last = 0;
  longint open_address[$], open_words[$];
  reg [63:0] program_words[$], read_words[$];
  longint due;

  accelerator accelerator (
      .clk(clk), .rst(1'b0), .start(start), .address(26'd0), .count(instructions[23:0]), .idle(idle), .units(),
      .program_request_payload(program_request), .program_request_valid(program_asked),
      .program_request_ready(1'b1), .program_words_payload(program_word), .program_words_valid(program_there),
      .program_words_ready(program_taken), .read_request_payload(read_request), .read_request_valid(read_asked),
      .read_request_ready(1'b1), .read_words_payload(read_word), .read_words_valid(read_there),
      .read_words_ready(read_taken), .write_request_payload(write_request), .write_request_valid(write_asked),
      .write_request_ready(1'b1), .write_words_payload(write_word), .write_words_valid(write_given),
      .write_words_ready(1'b1), .write_done(write_done)
  );

  always @(posedge clk) begin
    if (now == -2) begin
      if (!$value$plusargs("run=%s", run) || !$value$plusargs("instructions=%d", instructions)
          || !$value$plusargs("cycles=%d", cycles)) begin
        $display("give +run, +instructions and +cycles");
        $fatal;
      end
      $readmemh({run, ".program.hex"}, code);
      $readmemh({run, ".before.hex"}, memory);
      $readmemh({run, ".after.hex"}, expected);
    end
    if (now > 0 && idle) begin
      wrong = 0;
      for (k = 0; k < `WORDS; k = k + 1) wrong = wrong + (memory[k] != expected[k] ? 1 : 0);
      $display("%0s: %0d cycles (%0d expected), %0d of %0d words differ", run, now, cycles, wrong, `WORDS);
      if (wrong != 0 || now != longint'(cycles)) $fatal;
      $finish;
    end
    if (program_there && program_taken) begin
      program_due.pop_front();
      program_words.pop_front();
    end
    if (program_asked)
      for (k = 0; k < program_request[45:26]; k = k + 1) begin
        due = now + `LATENCY;
        program_last = due > program_last + 1 ? due : program_last + 1;
        program_due.push_back(program_last);
        program_words.push_back(code[program_request[25:0]+k]);
      end
    if (read_there && read_taken) begin
      read_due.pop_front();
      read_words.pop_front();
    end
    if (read_asked)
      for (k = 0; k < read_request[45:26]; k = k + 1) begin
        due = now + `LATENCY;
        read_last = due > read_last + 1 ? due : read_last + 1;
        read_due.push_back(read_last);
        read_words.push_back(memory[read_request[25:0]+k]);
      end
    if (write_done) done_due.pop_front();
    if (write_asked) begin
      open_address.push_back(longint'(write_request[25:0]));
      open_words.push_back(longint'(write_request[45:26]));
    end
    if (write_given) begin
      memory[open_address[0]] = write_word;
      open_address[0] = open_address[0] + 1;
      open_words[0] = open_words[0] - 1;
      if (open_words[0] == 0) begin
        open_address.pop_front();
        open_words.pop_front();
        due = now + `LATENCY;
        done_last = due > done_last + 1 ? due : done_last + 1;
        done_due.push_back(done_last);
      end
    end
    now = now + 1;
    start <= now == 0;
    program_there <= program_due.size() != 0 && program_due[0] <= now;
    program_word <= program_words.size() != 0 ? program_words[0] : 0;
    read_there <= read_due.size() != 0 && read_due[0] <= now;
    read_word <= read_words.size() != 0 ? read_words[0] : 0;
    write_done <= done_due.size() != 0 && done_due[0] == now;
  end
endmodule
