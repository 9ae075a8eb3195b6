// Buffers, how much memory is left for them, and the error where that is too little.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

namespace fastcascade {

// Cache-line-aligned floats, zero at first.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t floats);
  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }
  int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float[], Free> data_;
  int64_t size_ = 0;
};

// A std::bad_alloc that says what did not fit and what to try.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(const std::string& message) : message_(message) {}
  const char* what() const noexcept override { return message_.what(); }

 private:
  std::runtime_error message_;  // unlike std::string, copied without throwing
};

// Memory that this process can still get: the least of what the machine, its container and the process's own
// address-space limit leave.
int64_t available_bytes();

// For messages: "7.2 GiB", "3.5 MiB".
std::string bytes_text(int64_t bytes);

}  // namespace fastcascade
