// The terms of vpdpbusd, which multiplies four unsigned bytes with four signed ones and adds up in 32 bits. Included by
// the kernels that have it.

using Term = uint8_t;  // the weights are signed
constexpr int kGroup = 4;

// Reads and writes by 16 terms.
FC_INLINE void copy_terms(const uint8_t* from, int64_t count, Term* to) {
  for (int64_t i = 0; i < count; i += 16)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
}
