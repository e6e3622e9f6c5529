// Threads for loops over independent pieces; the only file that names OpenMP.
//
// A piece must compute the same bytes whichever thread runs it: cut the work by fixed tiles (never by the number of threads) and results cannot depend on that number.
#pragma once

#include <algorithm>
#include <exception>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "base/matrix_view.h"

namespace mrgptq {

// What threads = 0 means: OMP_NUM_THREADS where it is set, else one thread a core.
inline int default_threads() noexcept {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

// Calls body(i) once for every i in [0, count). The first exception is carried out of the parallel region (which none may leave by itself) and thrown again at its end.
template <class Body>
void parallel_for(Index count, int threads, Body&& body) {
    const int wanted = threads > 0 ? threads : default_threads();
    [[maybe_unused]] const int team = static_cast<int>(std::clamp<Index>(count, 1, wanted));
#ifdef _OPENMP
    // A team of one would still pay for the region; dynamic chunks even out pieces of unequal cost (the triangle of a Hessian).
    if (team > 1) {
        std::exception_ptr thrown;
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
        for (Index i = 0; i < count; ++i) {
            try {
                body(i);
            } catch (...) {
#pragma omp critical(mrgptq_exception)
                if (!thrown) thrown = std::current_exception();
            }
        }
        if (thrown) std::rethrow_exception(std::move(thrown));
        return;
    }
#endif
    for (Index i = 0; i < count; ++i) body(i);
}

// The same over ranges [begin, end) of at most `grain` indices, for bodies too short to be called one by one.
template <class Body>
void parallel_for_ranges(Index count, Index grain, int threads, Body&& body) {
    parallel_for((count + grain - 1) / grain, threads, [&](Index piece) { body(piece * grain, std::min(count, (piece + 1) * grain)); });
}

}  // namespace mrgptq
