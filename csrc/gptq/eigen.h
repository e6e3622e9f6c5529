// Eigen as this room uses it: no threads of its own, and block sizes that do not follow the machine's caches, since they decide the order of sums and so the bytes.
#pragma once

#define EIGEN_DONT_PARALLELIZE
#define EIGEN_NO_IO

#include <Eigen/Cholesky>
#include <Eigen/Core>

namespace mrgptq {

// Called once when the module is loaded, before any product.
inline void fix_eigen_blocking() { Eigen::setCpuCacheSizes(32 * 1024, 1024 * 1024, 16 * 1024 * 1024); }

template <class Real>
using Columns = Eigen::Matrix<Real, Eigen::Dynamic, Eigen::Dynamic, Eigen::ColMajor>;

// A row-major matrix read as the transpose that Eigen's column-major kernels like.
template <class Real>
using Strided = Eigen::Map<const Columns<Real>, Eigen::Unaligned, Eigen::OuterStride<>>;

}  // namespace mrgptq
