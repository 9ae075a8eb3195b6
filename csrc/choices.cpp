#include "choices.h"

namespace fastcascade {

bool prefers_winograd(const std::string&, int64_t in_channels, int64_t, int64_t height, int64_t width) {
  return in_channels >= 8 && height * width >= 9;
}

}  // namespace fastcascade
