// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: LDTILECFG, STTILECFG, TILELOADD, TILESTORED,
// TILEZERO, TDPBF16PS; 2.1.3 and 2.1.5 (ModRM and SIB), 2.3.5 (VEX prefix).
#include "tile_trap.h"

#if MPILLAMA_AMX
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tile_config.h"

namespace mpillama {
namespace {

struct Tiles {
  TileConfig config;
  uint8_t data[8][16][64]{};

  // The configuration must be one that the processor would take; of palette 0, which is none, nothing else counts.
  bool configure(const void* from) {
    TileConfig c;
    std::memcpy(&c, from, sizeof c);
    if (c.palette == 0) c = TileConfig{};
    bool good = c.palette <= 1 && c.start_row == 0;
    for (uint8_t byte : c.reserved) good &= byte == 0;
    for (int i = 0; i < 16; i++) good &= i < 8 ? c.row_bytes[i] <= 64 && c.rows[i] <= 16 : !c.row_bytes[i] && !c.rows[i];
    if (good) config = c, std::memset(data, 0, sizeof data);
    return good;
  }

  bool store(void* to) const {
    std::memcpy(to, &config, sizeof config);
    return true;
  }

  bool usable(int t) const { return t < 8 && config.palette == 1 && config.rows[t] && config.row_bytes[t]; }

  // c += a b, of which b has pairs of rows side by side.
  bool multiply(int c, int a, int b) {
    if (!usable(c) || !usable(a) || !usable(b) || c == a || c == b || a == b) return false;
    const int m = config.rows[c], n = config.row_bytes[c] / 4, k = config.row_bytes[a] / 4;
    if (config.rows[a] != m || config.rows[b] != k || config.row_bytes[b] / 4 != n) return false;
    float sums[16];
    for (int i = 0; i < m; i++) {
      std::memcpy(sums, data[c][i], sizeof sums);
      for (int j = 0; j < 2 * k; j++)
        for (int column = 0; column < n; column++)
          sums[column] += value(data[a][i] + 2 * j) * value(data[b][j / 2] + 4 * column + 2 * (j % 2));
      std::memcpy(data[c][i], sums, size_t(4 * n));
    }
    return true;
  }

 private:
  static float value(const uint8_t* bf16) {
    const uint32_t bits = uint32_t(bf16[1]) << 24 | uint32_t(bf16[0]) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
  }
};

thread_local Tiles tiles;

// One instruction with a VEX prefix of three bytes: C4, RXB and map, W vvvv L pp, opcode, ModRM.
class Instruction {
 public:
  explicit Instruction(const ucontext_t& context)
      : registers_(context.uc_mcontext.gregs),
        code_(reinterpret_cast<const uint8_t*>(registers_[REG_RIP])),
        end_(code_ + 5) {}

  // The place of the next one, or null if this is none of ours.
  const uint8_t* run() {
    if (code_[0] != 0xc4 || (code_[1] & 0x1f) != 2 || (code_[2] & 0x84)) return nullptr;
    const int prefix = code_[2] & 3, opcode = code_[3], reg = (code_[4] >> 3 & 7) | high(7);
    enum { none, x66, xf3, xf2 };
    const bool memory = code_[4] >> 6 != 3, sib = memory && (code_[4] & 7) == 4;
    if (memory && !find_memory()) return nullptr;
    bool done = false;
    if (opcode == 0x49 && prefix == none && memory) done = tiles.configure(reinterpret_cast<const void*>(base_ + stride_));
    if (opcode == 0x49 && prefix == x66 && memory) done = tiles.store(reinterpret_cast<void*>(base_ + stride_));
    if (opcode == 0x49 && prefix == xf2 && !memory) done = zero(reg);
    if (opcode == 0x4b && prefix == xf2 && sib) done = move(reg, true);
    if (opcode == 0x4b && prefix == xf3 && sib) done = move(reg, false);
    if (opcode == 0x5c && prefix == xf3 && !memory)
      done = tiles.multiply(reg, (code_[4] & 7) | high(5), ~code_[2] >> 3 & 15);
    return done ? end_ : nullptr;
  }

 private:
  // A bit of RXB as the highest of a register's number.
  int high(int bit) const { return (~code_[1] >> bit & 1) << 3; }

  uint64_t value(int number) const {
    static const int names[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return uint64_t(registers_[names[number]]);
  }

  // Sets base_, stride_ (the index) and end_.
  bool find_memory() {
    const int mode = code_[4] >> 6, rm = code_[4] & 7;
    const uint8_t* p = code_ + 5;
    int base = rm | high(5);
    if (rm == 4) {
      const int index = (*p >> 3 & 7) | high(6);
      if (index != 4) stride_ = value(index) << (*p >> 6);
      base = (*p++ & 7) | high(5);
    }
    if (mode == 0 && (base & 7) == 5) return false;  // relative to the instruction or to nothing: not in our code
    base_ = value(base);
    if (mode == 1) base_ += uint64_t(int64_t(int8_t(*p++)));
    if (mode == 2) {
      int32_t offset;
      std::memcpy(&offset, p, sizeof offset);
      base_ += uint64_t(int64_t(offset)), p += 4;
    }
    end_ = p;
    return true;
  }

  static bool zero(int t) {
    if (!tiles.usable(t)) return false;
    std::memset(tiles.data[t], 0, sizeof tiles.data[t]);
    return true;
  }

  bool move(int t, bool load) const {
    if (!tiles.usable(t)) return false;
    if (load) zero(t);
    for (uint64_t row = 0; row < tiles.config.rows[t]; row++) {
      uint8_t* tile = tiles.data[t][row];
      void* memory = reinterpret_cast<void*>(base_ + row * stride_);
      const size_t n = tiles.config.row_bytes[t];
      load ? std::memcpy(tile, memory, n) : std::memcpy(memory, tile, n);
    }
    return true;
  }

  const greg_t* registers_;
  const uint8_t* code_;
  const uint8_t* end_;
  uint64_t base_ = 0, stride_ = 0;
};

struct sigaction before;
std::atomic<bool> trapped{false};

void on_illegal_instruction(int, siginfo_t*, void* context) {
  ucontext_t& at = *static_cast<ucontext_t*>(context);
  if (const uint8_t* next = Instruction(at).run())
    at.uc_mcontext.gregs[REG_RIP] = greg_t(next);
  else
    sigaction(SIGILL, &before, nullptr);  // it comes again, and meets what was there before
}

}  // namespace

void trap_tiles() {
  struct sigaction now {};
  sigaction(SIGILL, nullptr, &now);
  if (now.sa_sigaction == on_illegal_instruction) return;
  before = now;
  struct sigaction action {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGILL, &action, nullptr);
  trapped = true;
}

bool tiles_trapped() { return trapped; }

}  // namespace mpillama

#else

namespace mpillama {

void trap_tiles() {}
bool tiles_trapped() { return false; }

}  // namespace mpillama

#endif
