#include "level.h"

#include <cstdint>
#include <stdexcept>

#if MPILLAMA_X86
#include <cpuid.h>
#endif
#if MPILLAMA_ARM
#include <sys/auxv.h>
#include <sys/prctl.h>
#endif
#if MPILLAMA_AMX
#include <sys/syscall.h>
#include <unistd.h>

#include "tile_trap.h"
#endif

namespace mpillama {
namespace {

#if MPILLAMA_X86
struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
  return r;
}

bool bit(uint32_t word, int i) { return word >> i & 1; }

// Which register states the operating system saves (XCR0).
uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

bool amx_usable([[maybe_unused]] const Registers& seven, [[maybe_unused]] uint64_t state) {
#if MPILLAMA_AMX
  if (!bit(seven.d, 22) || !bit(seven.d, 24) || (state & 0x60000) != 0x60000) return false;
  // Tile data (state 18) is given to processes that ask: Documentation/arch/x86/xstate.rst of Linux.
  constexpr long arch_req_xcomp_perm = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, tile_data) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Level> machine_levels() {
  std::vector<Level> levels{Level::scalar};
#if MPILLAMA_X86
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0);
  if (!bit(one.c, 27)) return levels;  // no XGETBV
  const uint64_t state = enabled_state();
  const bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6;
  if (!ymm || !bit(one.c, 12) || !bit(one.c, 29) || !bit(seven.b, 5)) return levels;
  levels.push_back(Level::avx2);
  const bool avx512 = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31) && bit(seven.c, 11);
  if (!zmm || !avx512) return levels;
  levels.push_back(Level::avx512);
  if (amx_usable(seven, state)) levels.push_back(Level::amx);
#elif MPILLAMA_ARM
  levels.push_back(Level::neon);
  // Bits of Linux: Documentation/arch/arm64/elf_hwcaps.rst (asimddp, i8mm, sve).
  const bool dotprod = getauxval(AT_HWCAP) >> 20 & 1;
  if (dotprod) levels.push_back(Level::dotprod);
#if MPILLAMA_I8MM
  if (dotprod && getauxval(AT_HWCAP2) >> 13 & 1) levels.push_back(Level::i8mm);
#endif
#if MPILLAMA_SVE512
  // PR_SVE_GET_VL, whose lower 16 bits are the bytes of a vector: Documentation/arch/arm64/sve.rst.
  if (getauxval(AT_HWCAP) >> 22 & 1 && (prctl(51) & 0xffff) == 64) levels.push_back(Level::sve512);
#endif
#endif
  return levels;
}

Lookahead preferred_lookahead() {
#if MPILLAMA_X86
  // The first level of AMD's Zen can await few lines at once, which are better left to the loads: without this, a thread has
  // 0.8 of the speed.
  if (constexpr uint32_t auth = 0x68747541; cpuid(0, 0).b == auth) return {768, false, 0};
  // Sapphire Rapids, and others with tiles; Cascade Lake wants what follows.
  if (bit(cpuid(7, 0).d, 24)) return {3072, false, 256};
#endif
  return {2048, true, 0};
}

}  // namespace

const Lookahead lookahead = preferred_lookahead();

std::vector<Level> available_levels() {
  std::vector<Level> levels = machine_levels();
#if MPILLAMA_AMX
  if (levels.back() == Level::avx512 && tiles_trapped()) levels.push_back(Level::amx);
#endif
  return levels;
}

const char* level_name(Level level) {
  switch (level) {
    case Level::scalar: return "scalar";
    case Level::avx2: return "avx2";
    case Level::avx512: return "avx512";
    case Level::amx: return "amx";
    case Level::neon: return "neon";
    case Level::dotprod: return "dotprod";
    case Level::i8mm: return "i8mm";
    case Level::sve512: return "sve512";
  }
  return "";
}

Level choose_level(const std::string& name) {
  if (name.empty()) return machine_levels().back();
  const std::vector<Level> levels = available_levels();
  std::string have;
  for (Level level : levels) {
    if (name == level_name(level)) return level;
    have += have.empty() ? "" : ", ";
    have += level_name(level);
  }
  throw std::invalid_argument("CPU level " + name + " is not available; this machine has " + have);
}

}  // namespace mpillama
