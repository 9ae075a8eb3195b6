// Operations in words, for describe().
#pragma once

#include <string>

#include "stage_spec.h"

namespace fastcascade {

std::string operation_text(const OpSpec& op, const Shape& in);

}  // namespace fastcascade
