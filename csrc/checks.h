// Turns the error of a CUDA launch into a Python exception with its name and text.
#pragma once

#include <stdexcept>
#include <string>

#include "logprob_entropy.h"

#define QL_CUDA_CHECK(launch)                                                                             \
  do {                                                                                                    \
    if (const int ql_error = (launch)) {                                                                  \
      throw std::runtime_error(std::string("CUDA error ") + ql::cuda::error_name(ql_error) + ": " +       \
                               ql::cuda::error_text(ql_error));                                           \
    }                                                                                                     \
  } while (false)
