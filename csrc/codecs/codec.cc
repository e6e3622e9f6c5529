#include "codecs/codec.h"

#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "base/parallel.h"
#include "codecs/packing.h"

namespace mrgptq {
namespace {

// Rows a thread takes at a time: enough to hide the handing out, few enough to share a small matrix.
constexpr Index row_grain = 8;

template <class T>
void check_groups(const MatrixView<T>& matrix, const MatrixView<const std::uint8_t>& scales, Index group_size, const char* name) {
    check(matrix.cols % group_size == 0, std::string(name) + " has " + std::to_string(matrix.cols) + " columns; the format needs a multiple of " + std::to_string(group_size));
    check(scales.rows == matrix.rows && scales.cols == matrix.cols / group_size,
          "scales have shape (" + std::to_string(scales.rows) + ", " + std::to_string(scales.cols) + "); " + name + " needs (" + std::to_string(matrix.rows) + ", " +
              std::to_string(matrix.cols / group_size) + ")");
}

void check_codes(const MatrixView<const std::uint8_t>& codes, Index rows, Index cols) {
    check(codes.rows == rows && codes.cols * 2 == cols, "codes have shape (" + std::to_string(codes.rows) + ", " + std::to_string(codes.cols) + "); got a matrix of shape (" + std::to_string(rows) + ", " +
                                                            std::to_string(cols) + "), two columns a byte");
}

void encode_values(const float* x, Index count, float step, std::uint8_t* codes) noexcept {
    // Divide, never multiply by a rounded reciprocal: that moves ties.
    for (Index c = 0; c < count; ++c) codes[c] = e2m1::encode(x[c] / step);
}

void round_values(const float* x, Index count, float step, float* out) noexcept {
    for (Index c = 0; c < count; ++c) out[c] = step * e2m1::decode(e2m1::encode(x[c] / step));
}

// Kept out of line: with the group's length known, GCC 12 unrolls the two table look-ups completely and compiles this file for half a minute, for no faster code.
[[gnu::noinline]] void decode_values(const std::uint8_t* packed, Index count, float step, float* x) noexcept {
    for (Index j = 0; j < count / 2; ++j) {
        x[2 * j] = step * e2m1::decode(packed[j]);
        x[2 * j + 1] = step * e2m1::decode(packed[j] >> 4);
    }
}

}  // namespace

float amax(MatrixView<const float> x, int threads) {
    std::vector<float> largest(static_cast<std::size_t>((x.rows + row_grain - 1) / row_grain), 0.0f);
    parallel_for_ranges(x.rows, row_grain, threads, [&](Index begin, Index end) {
        float& mine = largest[static_cast<std::size_t>(begin / row_grain)];
        for (Index r = begin; r < end; ++r) mine = std::max(mine, group_amax(x.row(r), x.cols));
    });
    return largest.empty() ? 0.0f : *std::max_element(largest.begin(), largest.end());
}

Index first_nonfinite(MatrixView<const float> x, int threads) {
    std::vector<Index> found(static_cast<std::size_t>((x.rows + row_grain - 1) / row_grain), -1);
    parallel_for_ranges(x.rows, row_grain, threads, [&](Index begin, Index end) {
        for (Index r = begin; r < end; ++r) {
            const float* row = x.row(r);
            // One flag a row lets the scan vectorise; the position is looked for only where there is one.
            std::uint32_t worst = 0;
            for (Index c = 0; c < x.cols; ++c) worst = std::max(worst, std::bit_cast<std::uint32_t>(row[c]) & 0x7F800000u);
            if (worst != 0x7F800000u) continue;
            Index c = 0;
            while ((std::bit_cast<std::uint32_t>(row[c]) & 0x7F800000u) != 0x7F800000u) ++c;
            found[static_cast<std::size_t>(begin / row_grain)] = r * x.cols + c;
            return;
        }
    });
    const auto first = std::find_if(found.begin(), found.end(), [](Index position) { return position >= 0; });
    return first == found.end() ? -1 : *first;
}

void find_scales(std::string_view format, const ScaleRule& rule, MatrixView<const float> weight, float tensor_scale, MatrixView<const double> hessian, MatrixView<std::uint8_t> scales, int threads) {
    const bool weighted = rule.search == ScaleSearch::hessian || rule.search == ScaleSearch::hessian_block;
    check(!weighted || (hessian.rows == weight.cols && hessian.cols == weight.cols), "the scale rule weighs errors by a hessian of shape (" + std::to_string(weight.cols) + ", " +
                                                                                         std::to_string(weight.cols) + "); got (" + std::to_string(hessian.rows) + ", " + std::to_string(hessian.cols) + ")");
    with_format(format, [&]<class Format>(Format) {
        check_groups<const float>(weight, scales, Format::group_size, "weight");
        parallel_for_ranges(weight.rows, row_grain, threads, [&](Index begin, Index end) {
            for (Index r = begin; r < end; ++r)
                for (Index g = 0; g < scales.cols; ++g) {
                    const Index c = g * Format::group_size;
                    const GroupMoment moment = weighted ? GroupMoment{hessian.row(c) + c, hessian.row_stride} : GroupMoment{};
                    scales.row(r)[g] = group_scale<Format>(weight.row(r) + c, rule, tensor_scale, moment);
                }
        });
    });
}

void encode(std::string_view format, MatrixView<const float> weight, MatrixView<const std::uint8_t> scales, float tensor_scale, MatrixView<std::uint8_t> codes, int threads) {
    with_format(format, [&]<class Format>(Format) {
        check_groups(weight, scales, Format::group_size, "weight");
        check_codes(codes, weight.rows, weight.cols);
        parallel_for_ranges(weight.rows, row_grain, threads, [&](Index begin, Index end) {
            std::array<std::uint8_t, Format::group_size> group;
            for (Index r = begin; r < end; ++r)
                for (Index g = 0; g < scales.cols; ++g) {
                    encode_values(weight.row(r) + g * Format::group_size, Format::group_size, group_step<Format>(scales.row(r)[g], tensor_scale), group.data());
                    pack_row(group.data(), Format::group_size, codes.row(r) + g * Format::group_size / 2);
                }
        });
    });
}

void dequantize(std::string_view format, MatrixView<const std::uint8_t> codes, MatrixView<const std::uint8_t> scales, float tensor_scale, MatrixView<float> out, int threads) {
    with_format(format, [&]<class Format>(Format) {
        check_groups(out, scales, Format::group_size, "codes");
        check_codes(codes, out.rows, out.cols);
        parallel_for_ranges(out.rows, row_grain, threads, [&](Index begin, Index end) {
            for (Index r = begin; r < end; ++r)
                for (Index g = 0; g < scales.cols; ++g) {
                    const float step = group_step<Format>(scales.row(r)[g], tensor_scale);
                    decode_values(codes.row(r) + g * Format::group_size / 2, Format::group_size, step, out.row(r) + g * Format::group_size);
                }
        });
    });
}

void round_to_grid(std::string_view format, const ScaleRule& rule, MatrixView<const float> x, float tensor_scale, MatrixView<float> out, int threads) {
    check(out.rows == x.rows && out.cols == x.cols, "round_to_grid: out has another shape than x");
    with_format(format, [&]<class Format>(Format) {
        check(x.cols % Format::group_size == 0, "x has " + std::to_string(x.cols) + " columns; " + std::string(Format::name) + " needs a multiple of " + std::to_string(Format::group_size));
        parallel_for_ranges(x.rows, row_grain, threads, [&](Index begin, Index end) {
            for (Index r = begin; r < end; ++r)
                for (Index c0 = 0; c0 < x.cols; c0 += Format::group_size) {
                    const float step = group_step<Format>(group_scale<Format>(x.row(r) + c0, rule, tensor_scale), tensor_scale);
                    round_values(x.row(r) + c0, Format::group_size, step, out.row(r) + c0);
                }
        });
    });
}

}  // namespace mrgptq
