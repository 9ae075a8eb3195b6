#include "memory.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>

namespace fastcascade {
namespace {

constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();
constexpr int64_t kCacheLineFloats = 16;

// The number that a file starts with; kUnlimited where there is none ("max" in a cgroup's file).
int64_t number_in(const char* path) {
  int64_t number = 0;
  return std::ifstream(path) >> number ? number : kUnlimited;
}

int64_t machine_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  for (int64_t kilobytes; file >> name >> kilobytes; std::getline(file, unit))
    if (name == "MemAvailable:") return kilobytes << 10;
  const int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  return pages > 0 && page > 0 ? pages * page : kUnlimited;
}

int64_t address_space_bytes() {
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) || limit.rlim_cur == RLIM_INFINITY) return kUnlimited;
  const int64_t used_pages = number_in("/proc/self/statm");
  const int64_t used = used_pages == kUnlimited ? 0 : used_pages * sysconf(_SC_PAGESIZE);
  return std::max<int64_t>(0, static_cast<int64_t>(limit.rlim_cur) - used);
}

}  // namespace

Buffer::Buffer(int64_t floats) : size_(floats) {
  const int64_t lines = std::max<int64_t>(1, (floats + kCacheLineFloats - 1) / kCacheLineFloats);
  const size_t bytes = static_cast<size_t>(lines * kCacheLineFloats) * sizeof(float);
  data_.reset(static_cast<float*>(std::aligned_alloc(kCacheLineFloats * sizeof(float), bytes)));
  if (!data_) throw std::bad_alloc();
  std::memset(data_.get(), 0, bytes);
}

int64_t available_bytes() {
  // Containers see their limit here, under cgroup version 2 or 1.
  const int64_t container =
      std::min(number_in("/sys/fs/cgroup/memory.max"), number_in("/sys/fs/cgroup/memory/memory.limit_in_bytes"));
  return std::min({machine_bytes(), container, address_space_bytes()});
}

std::string bytes_text(int64_t bytes) {
  const bool large = bytes >= int64_t{1} << 30;
  char text[32];
  std::snprintf(text, sizeof text, "%.1f %s", static_cast<double>(bytes) / (large ? 1 << 30 : 1 << 20),
                large ? "GiB" : "MiB");
  return text;
}

}  // namespace fastcascade
