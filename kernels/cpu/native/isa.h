// What the files of one instruction set have in common; see kernels.h.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace ryzanstein {
namespace RYZANSTEIN_ISA {

void matmul(const Weight&, const Activations&, int64_t, int64_t, const float*, float*, int64_t,
            int64_t, const Soon&);
void store_forms(const float*, int64_t, int64_t, const Activations&);
void embed_row(const Weight&, int64_t, float, float*);
void rms_norm_row(const float*, const float*, float, int64_t, float*);
float squared_norm(const float*, int64_t);
void scale_row(const float*, const float*, float, int64_t, float*);
void add_row(const float*, const float*, int64_t, float*);
void gated_row(const float*, int64_t, int, float*);
void rotate_head(float*, const float*, const float*, int64_t);
void write_key(const LayerCache&, int64_t, int64_t, const float*);
void write_value(const LayerCache&, int64_t, int64_t, const float*);
void copy_page(const LayerCache&, int64_t, const LayerCache&, int64_t);
void attend(const LayerCache&, const int32_t*, int64_t, int, const float* const*, const int64_t*,
            const float*, float, int64_t, float* const*);
void delta_head(const DeltaRun&);
void convolve_row(const float* const*, const float*, int, int64_t, bool, float*);
void multiply_row(const float*, const float*, int64_t, float*);
void unit_row(float*, int64_t, float);
void gate_row(const float*, const float*, int64_t, int, float*);
void softcap_row(float, int64_t, float*);
void penalize(float*, int64_t, const Penalty&);
void forbid(const uint32_t*, const float*, int64_t, float*);
int64_t argmax(const float*, int64_t);
int64_t draw(const float*, int64_t, const Filters&, uint8_t*);
int64_t probe(Probe, const uint8_t*, int64_t);

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Below this a group's scale has no finite inverse; such values are zero.
constexpr float kSmallest = 1e-35f;

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
