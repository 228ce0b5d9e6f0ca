// Whole pages, of all layers, in another format than the cache's: one block of bytes each.
#pragma once

#include <memory>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace ryzanstein {

class PageCodec {
 public:
  // `layers` is the cache, whose memory stays with the caller.
  PageCodec(std::shared_ptr<Pool> pool, const Kernels* kernels, std::vector<LayerCache> layers,
            CacheFormat format)
      : pool_(std::move(pool)), kernels_(kernels), layers_(std::move(layers)), format_(format) {
    for (const LayerCache& layer : layers_) {
      const LayerCache kept = other(layer, nullptr);
      if (!kept.fits()) {
        throw std::invalid_argument("heads of this width cannot be kept in this format");
      }
      starts_.push_back(bytes_);
      const int64_t vectors = kept.heads * kept.page_size;
      bytes_ += (2 * vectors * (kept.vector_bytes() + kept.scale_bytes()) + 63) / 64 * 64;
    }
  }

  // Of one page's block, which begins at a multiple of 64 bytes.
  int64_t bytes() const { return bytes_; }

  void compress(int64_t page, uint8_t* block) const {
    each_layer(block, [&](const LayerCache& layer, const LayerCache& kept) {
      kernels_->copy_page(layer, page, kept, 0);
    });
  }

  void restore(uint8_t* block, int64_t page) const {
    each_layer(block, [&](const LayerCache& layer, const LayerCache& kept) {
      kernels_->copy_page(kept, 0, layer, page);
    });
  }

 private:
  // One page of a layer at `block`: keys, values, and the scales of both.
  LayerCache other(const LayerCache& layer, uint8_t* block) const {
    LayerCache kept = layer;
    kept.format = format_;
    const int64_t vectors = layer.heads * layer.page_size;
    kept.keys = block;
    kept.values = kept.keys + vectors * kept.vector_bytes();
    uint8_t* scales = kept.values + vectors * kept.vector_bytes();
    kept.key_scales = scales;
    kept.value_scales = scales + vectors * kept.scale_bytes();
    return kept;
  }

  template <typename Body>
  void each_layer(uint8_t* block, const Body& body) const {
    const Pool::Awake awake(*pool_);
    pool_->run(static_cast<int64_t>(layers_.size()), 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const LayerCache& layer = layers_[static_cast<size_t>(n)];
        body(layer, other(layer, block + starts_[static_cast<size_t>(n)]));
      }
    });
  }

  std::shared_ptr<Pool> pool_;
  const Kernels* kernels_;
  std::vector<LayerCache> layers_;
  CacheFormat format_;
  std::vector<int64_t> starts_;  // of each layer in a block
  int64_t bytes_ = 0;
};

}  // namespace ryzanstein
