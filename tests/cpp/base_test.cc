// Views, checks and the parallel loop.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "base/check.h"
#include "base/matrix_view.h"
#include "base/parallel.h"

namespace mrgptq {
namespace {

TEST(MatrixView, RowsFollowTheStride) {
    std::vector<int> data(24);
    std::iota(data.begin(), data.end(), 0);
    const MatrixView<int> wide{data.data() + 1, 4, 3, 6};
    const MatrixView<int> flipped{data.data() + 18, 4, 6, -6};
    const MatrixView<int> broadcast{data.data() + 5, 4, 6, 0};
    for (Index r = 0; r < 4; ++r)
        for (Index c = 0; c < 3; ++c) {
            EXPECT_EQ(wide.row(r)[c], 6 * r + c + 1);
            EXPECT_EQ(flipped.row(r)[c], 18 - 6 * r + c);
            EXPECT_EQ(broadcast.row(r)[c], 5 + c);
        }
}

TEST(MatrixView, AWritableViewServesAsAReadOnlyOne) {
    int data[6] = {};
    const MatrixView<int> writable{data + 3, 2, 3, -3};
    const MatrixView<const int> read = writable;
    writable.row(1)[2] = 7;
    EXPECT_EQ(data[2], 7);
    EXPECT_EQ(read.row(1)[2], 7);
    EXPECT_EQ(read.rows, 2);
    EXPECT_EQ(read.cols, 3);
    EXPECT_EQ(read.row_stride, -3);
    static_assert(!std::is_convertible_v<MatrixView<const int>, MatrixView<int>>);
}

TEST(Check, ThrowsTheMessage) {
    EXPECT_NO_THROW(check(true, "never seen"));
    try {
        check(false, "rows is 3; expected 4");
        FAIL() << "check(false) came back";
    } catch (const std::invalid_argument& error) {
        EXPECT_STREQ(error.what(), "rows is 3; expected 4");
    }
}

class ParallelFor : public ::testing::TestWithParam<std::tuple<Index, int>> {
protected:
    const Index count = std::get<0>(GetParam());
    const int threads = std::get<1>(GetParam());
};

INSTANTIATE_TEST_SUITE_P(CountsAndThreads, ParallelFor, ::testing::Combine(::testing::Values(0, 1, 7, 1000), ::testing::Values(0, 1, 2, 3, 8)));

TEST_P(ParallelFor, CallsEveryIndexOnce) {
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count));
    parallel_for(count, threads, [&](Index i) { ++calls.at(static_cast<std::size_t>(i)); });
    for (const auto& n : calls) EXPECT_EQ(n, 1);
}

TEST_P(ParallelFor, RangesTileTheCountWhateverTheThreads) {
    for (const Index grain : {1, 3, 8, 5000}) {
        std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count));
        std::atomic<int> wrong = 0;
        parallel_for_ranges(count, grain, threads, [&](Index begin, Index end) {
            wrong += begin % grain != 0 || end != std::min(begin + grain, count) || begin >= end;
            for (Index i = begin; i < end; ++i) ++calls.at(static_cast<std::size_t>(i));
        });
        EXPECT_EQ(wrong, 0) << "grain " << grain;
        for (const auto& n : calls) EXPECT_EQ(n, 1) << "grain " << grain;
    }
}

TEST_P(ParallelFor, CarriesAnExceptionOut) {
    if (count == 0) {
        EXPECT_NO_THROW(parallel_for(count, threads, [](Index) { throw std::runtime_error("called for nothing"); }));
        return;
    }
    for (const bool all : {false, true}) {  // one body throws, or every one does: one exception arrives
        try {
            parallel_for(count, threads, [&](Index i) { check(!all && i != count - 1, "index " + std::to_string(i)); });
            FAIL() << "no exception arrived";
        } catch (const std::invalid_argument& error) {
            const std::string message = error.what();
            EXPECT_EQ(message.rfind("index ", 0), 0u);
            EXPECT_TRUE(all || message == "index " + std::to_string(count - 1)) << message;
        }
    }
    std::atomic<Index> sum = 0;  // and the next loop runs as if nothing had happened
    parallel_for(count, threads, [&](Index i) { sum += i; });
    EXPECT_EQ(sum, count * (count - 1) / 2);
}

TEST_P(ParallelFor, Nests) {
    const Index inner = 13;
    std::vector<std::atomic<int>> calls(static_cast<std::size_t>(count * inner));
    parallel_for_ranges(count, 4, threads, [&](Index begin, Index end) {
        for (Index i = begin; i < end; ++i)
            parallel_for_ranges(inner, 5, threads, [&](Index first, Index last) {
                for (Index j = first; j < last; ++j) ++calls.at(static_cast<std::size_t>(i * inner + j));
            });
    });
    for (const auto& n : calls) EXPECT_EQ(n, 1);
}

TEST(Parallel, DefaultThreadsIsAtLeastOne) { EXPECT_GE(default_threads(), 1); }

#ifdef _OPENMP
TEST(Parallel, TwoThreadsRunAtTheSameTime) {
    // Each of the two bodies waits for the other one to begin: with one thread neither would see it before the deadline.
    std::atomic<int> begun = 0, met = 0;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    parallel_for(2, 2, [&](Index) {
        ++begun;
        while (begun < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
        met += begun == 2;
    });
    EXPECT_EQ(met, 2);
}

TEST(Parallel, OneThreadIsTheCallersOwn) {
    const auto caller = std::this_thread::get_id();
    parallel_for(100, 1, [&](Index) { EXPECT_EQ(std::this_thread::get_id(), caller); });
}
#endif

}  // namespace
}  // namespace mrgptq
