// Writing tokens into pages and copying pages; see vllm_lsa/ops/write_tokens.py and copy_pages.py.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "export.h"

// Strides, page and row sizes in bytes. Returns 0, or 4 * token + (1 offset, 2 slot, 3 host page out of range)
// with nothing written.
LSA_EXPORT int64_t lsa_write_tokens(const char* k, const char* v, int64_t k_stride, int64_t v_stride,
                                    const int32_t* offset, char* pool, int64_t slots, int64_t slot_stride,
                                    const int32_t* slot, char* host, int64_t host_pages, int64_t host_stride,
                                    const int64_t* host_page, int64_t tokens, int kv_heads, int chunk, int64_t row,
                                    int threads) {
  for (int64_t t = 0; t < tokens; t++) {
    if (offset[t] < 0 || offset[t] >= chunk) return 4 * t + 1;
    if (slot[t] < -1 || slot[t] >= slots) return 4 * t + 2;
    if (host_page[t] < -1 || host_page[t] >= host_pages) return 4 * t + 3;
  }
  const int64_t head = chunk * row, values = kv_heads * head;
  const int team = tokens * kv_heads * row < (1 << 16) ? 1 : threads;
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t t = 0; t < tokens; t++) {
    char* const pages[2] = {slot[t] < 0 ? nullptr : pool + slot[t] * slot_stride,
                            host_page[t] < 0 ? nullptr : host + host_page[t] * host_stride};
    for (char* page : pages) {
      if (!page) continue;
      for (int h = 0; h < kv_heads; h++) {
        char* dst = page + h * head + offset[t] * row;
        std::memcpy(dst, k + t * k_stride + h * row, row);
        std::memcpy(dst + values, v + t * v_stride + h * row, row);
      }
    }
  }
  return 0;
}

// Returns 0, or 4 * i + (1 dst index, 2 src index out of range) with nothing written.
LSA_EXPORT int64_t lsa_copy_pages(char* dst, int64_t dst_pages, int64_t dst_stride, const int64_t* dst_index,
                                  const char* src, int64_t src_pages, int64_t src_stride, const int64_t* src_index,
                                  int64_t n, int64_t page_bytes, int threads) {
  for (int64_t i = 0; i < n; i++) {
    if (dst_index[i] < 0 || dst_index[i] >= dst_pages) return 4 * i + 1;
    if (src_index[i] < 0 || src_index[i] >= src_pages) return 4 * i + 2;
  }
  const int team = n * page_bytes < (1 << 17) ? 1 : int(std::min<int64_t>(threads, n));
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
  for (int64_t i = 0; i < n; i++)
    std::memcpy(dst + dst_index[i] * dst_stride, src + src_index[i] * src_stride, page_bytes);
  return 0;
}
