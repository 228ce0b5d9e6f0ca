#include "isa.h"

#define TEXT(name) #name
#define NAME(name) TEXT(name)

namespace ryzanstein {
namespace RYZANSTEIN_ISA {

const Kernels kernels = {
    NAME(RYZANSTEIN_ISA), sizeof(PairValue) == 2,
    matmul,      store_forms, embed_row, rms_norm_row, squared_norm, scale_row,
    add_row,     gated_row,   rotate_head, write_key,
    write_value, copy_page,   attend,    delta_head,   convolve_row, multiply_row,
    unit_row,    gate_row,    softcap_row,
    penalize,    forbid,      argmax,    draw,         probe,
};

}  // namespace RYZANSTEIN_ISA
}  // namespace ryzanstein
