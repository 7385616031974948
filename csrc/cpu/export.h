#pragma once

// A function that vllm_lsa/ops/native.py calls by name.
#define LSA_EXPORT extern "C" __attribute__((visibility("default")))
