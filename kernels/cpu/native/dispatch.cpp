// Chooses among instruction sets. Compiled for any x86-64: the check itself must run everywhere.
#include <cpuid.h>

#include <cstring>

#include "kernels.h"

namespace ryzanstein {
namespace {

bool runs_avx2() {
  // Older compilers know no name of F16C.
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1) != 0;
}

#if defined(RYZANSTEIN_AVXVNNI)
// Intel's since Alder Lake, AMD's since Zen 5; older compilers do not know its name.
bool runs_avxvnni() {
#if defined(RYZANSTEIN_EMULATE)
  return runs_avx2();
#else
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  return runs_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1) != 0;
#endif
}
#endif

#if defined(RYZANSTEIN_EMULATE)
bool runs_avx512() { return runs_avx2(); }
bool runs_avx512bf16() { return runs_avx2(); }
#else
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool runs_avx512bf16() { return runs_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

struct Choice {
  const Kernels* kernels;
  bool (*runs)();
};
constexpr Choice kChoices[] = {  // best first
    {&avx512bf16::kernels, runs_avx512bf16},
    {&avx512::kernels, runs_avx512},
#if defined(RYZANSTEIN_AVXVNNI)
    {&avxvnni::kernels, runs_avxvnni},
#endif
    {&avx2::kernels, runs_avx2},
};

}  // namespace

std::vector<const Kernels*> running_kernels() {
  std::vector<const Kernels*> found;
  for (const Choice& choice : kChoices) {
    if (choice.runs()) found.push_back(choice.kernels);
  }
  return found;
}

const Kernels* find_kernels(const char* name) {
  for (const Kernels* kernels : running_kernels()) {
    if (std::strcmp(kernels->name, name) == 0) return kernels;
  }
  return nullptr;
}

}  // namespace ryzanstein
