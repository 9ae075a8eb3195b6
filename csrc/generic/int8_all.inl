// The int8 kernels of an instruction set whose products are computed in vector registers.

constexpr int kLeastRows = 1, kRunUnit = kGroup, kChunkTerms = 192 << 10;

// clang-format off
#include "int8.inl"
#include "int8_terms.inl"
#include "int8_tiles.inl"
#include "int8_conv.inl"
#include "int8_others.inl"
// clang-format on
