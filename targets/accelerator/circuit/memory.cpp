// The circuit under Verilator, with a memory that answers each of its ports after a fixed latency, a word in each cycle:
// the same memory as simulate.py's, behind one C function. Or its ports share a bus, which moves one word in each cycle:
// one to write before one that is read, and that before one of the program, which is asked for far ahead.

#include <algorithm>
#include <cstdint>
#include <deque>

#include "Vaccelerator.h"
#include "verilated.h"

namespace {

struct Request {
  uint32_t address, words;
};

// Address in the low 26 bits, words in the 20 above.
Request request(uint64_t payload) {
  return {static_cast<uint32_t>(payload & ((1u << 26) - 1)), static_cast<uint32_t>(payload >> 26)};
}

class Reads {
 public:
  Reads(const uint64_t* words, uint64_t size, int latency, bool shared)
      : words_(words), size_(size), latency_(latency), shared_(shared) {}

  bool valid(uint64_t now) const { return !waiting_.empty() && waiting_.front().first <= now; }
  uint64_t word() const { return waiting_.empty() ? 0 : waiting_.front().second; }

  bool step(uint64_t now, bool asked, uint64_t payload, bool taken) {
    if (taken) waiting_.pop_front();
    if (!asked) return true;
    const Request one = request(payload);
    for (uint32_t k = 0; k < one.words; k++) {
      last_ = std::max(last_ + !shared_, now + latency_);
      const uint64_t at = uint64_t{one.address} + k;
      waiting_.emplace_back(last_, at < size_ ? words_[at] : 0);
    }
    return true;
  }

 private:
  const uint64_t* words_;
  uint64_t size_, last_ = 0;
  int latency_;
  bool shared_;
  std::deque<std::pair<uint64_t, uint64_t>> waiting_;
};

class Writes {
 public:
  Writes(uint64_t* words, uint64_t size, int latency) : words_(words), size_(size), latency_(latency) {}

  bool done(uint64_t now) const { return !done_.empty() && done_.front() == now; }

  bool step(uint64_t now, bool asked, uint64_t payload, bool given, uint64_t word) {
    if (done(now)) done_.pop_front();
    if (asked) open_.push_back(request(payload));
    if (!given) return true;
    if (open_.empty() || open_.front().address >= size_) return false;
    words_[open_.front().address++] = word;
    if (--open_.front().words == 0) {
      open_.pop_front();
      last_ = std::max(now + latency_, last_ + 1);
      done_.push_back(last_);
    }
    return true;
  }

 private:
  uint64_t* words_;
  uint64_t size_, last_ = 0;
  int latency_;
  std::deque<Request> open_;
  std::deque<uint64_t> done_;
};

}  // namespace

// Cycles until the program is done; -1 where it is not after `limit`, -2 where it writes outside the memory.
// busy: four counts, the cycles in which LOAD, GEMM, POST and STORE were at work.
extern "C" int64_t run(uint64_t* memory, uint64_t size, const uint64_t* program, uint32_t count, int latency,
                       int shared, int64_t limit, uint64_t* busy) {
  VerilatedContext context;
  Vaccelerator top(&context, "top");
  Reads code(program, uint64_t{2} * count, latency, shared), reads(memory, size, latency, shared);
  Writes writes(memory, size, latency);
  top.program_request_ready = top.read_request_ready = top.write_request_ready = top.write_words_ready = 1;
  top.rst = 0;
  top.address = 0;
  top.count = count;
  int64_t result = -1;
  for (int64_t now = 0; now <= limit; now++) {
    top.start = now == 0;
    top.program_words_valid = code.valid(now);
    top.program_words_payload = code.word();
    top.read_words_valid = reads.valid(now);
    top.read_words_payload = reads.word();
    top.write_done = writes.done(now);
    top.clk = 0;
    if (shared) {
      top.eval();
      top.read_words_valid = reads.valid(now) && !top.write_words_valid;
      top.program_words_valid = code.valid(now) && !top.write_words_valid && !(top.read_words_valid && top.read_words_ready);
    }
    top.eval();
    if (now && top.idle) {
      result = now;
      break;
    }
    for (int unit = 0; unit < 4; unit++) busy[unit] += (top.units >> unit) & 1;
    code.step(now, top.program_request_valid, top.program_request_payload,
              top.program_words_valid && top.program_words_ready);
    reads.step(now, top.read_request_valid, top.read_request_payload,
               top.read_words_valid && top.read_words_ready);
    if (!writes.step(now, top.write_request_valid, top.write_request_payload,
                     top.write_words_valid && top.write_words_ready, top.write_words_payload)) {
      result = -2;
      break;
    }
    top.clk = 1;
    top.eval();
  }
  top.final();
  return result;
}
