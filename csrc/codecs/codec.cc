#include "codecs/codec.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <numeric>
#include <vector>

#include "base/buffer.h"
#include "base/finite.h"
#include "base/parallel.h"
#include "codecs/chunk.h"
#include "codecs/scale_search.h"
#include "rotations/rotated_rows.h"

namespace mrgptq {
namespace {

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

bool needs_hessian(const ScaleRule& rule) noexcept { return rule.search == ScaleSearch::hessian || rule.search == ScaleSearch::hessian_block; }

void check_group_rule(const ScaleRule& rule) { check(!needs_hessian(rule), "the scale rule weighs errors by a hessian; find_scales alone takes one"); }

// Where a row's codes, scales and rounded values go; nullptr where one is not wanted.
struct Targets {
    std::uint8_t* codes = nullptr;
    std::uint8_t* scales = nullptr;
    float* values = nullptr;

    void advance(Index groups, Index group_size) noexcept {
        if (codes) codes += groups * group_size / 2;
        if (scales) scales += groups;
        if (values) values += groups * group_size;
    }
};

// The scales of a chunk's groups, whose largest magnitudes are finite, by any rule of the group alone.
template <class Format>
MRGPTQ_INLINE void scales_of_chunk(const float* x, simd::Words amax, const ScaleRule& rule, float tensor_scale, std::uint8_t* scales) noexcept {
    using namespace simd;
    if (rule.search == ScaleSearch::absmax)
        store_bytes(scales, absmax_scales<Format>(amax, rule, tensor_scale));
    else if (rule.search == ScaleSearch::mse)
        least_error_scales<Format>(x, amax, rule, tensor_scale, scales);
    else if (rule.search == ScaleSearch::fpquant_mse)
        shrunk_scales<Format>(x, amax, rule, tensor_scale, scales);
    else
        for (int group = 0; group < lanes; ++group) scales[group] = group_scale<Format>(x + group * Format::group_size, rule, tensor_scale);
}

// Where a strip's values are read, and what is asked for from memory meanwhile: as many values from `next` on, a part in each phase of the work. Requests in a burst would wait for each other
// while the memory idles in the other phases, and the processor's own prefetching ends with the page.
struct Source {
    const float* x;
    const float* next;
    bool rotated;

    void advance(Index cols) noexcept {
        x += cols;
        next += cols;
    }

    // In eighths, about as long as the phases are: a rotation has asked for two and the search for largest magnitudes asks for two more, or for three, and the encoder for the rest. For columns
    // [c, c + width) of `cols`:
    MRGPTQ_INLINE void prefetch_in_search(Index c, Index width, Index cols) const noexcept { prefetch(rotated ? 2 : 0, rotated ? 4 : 3, c, width, cols); }
    MRGPTQ_INLINE void prefetch_in_encoder(Index c, Index width, Index cols) const noexcept { prefetch(rotated ? 4 : 3, 8, c, width, cols); }

private:
    MRGPTQ_INLINE void prefetch(Index begin, Index end, Index c, Index width, Index cols) const noexcept {
        const float* from = next + (cols * begin + c * (end - begin)) / 8;
        for (Index i = 0; i < width * (end - begin) / 8; i += 16) __builtin_prefetch(from + i);
    }
};

template <class Format, Quotient quotient>
MRGPTQ_INLINE void write_groups(Source from, Index groups, const float* steps, const float* inverses, Targets to) noexcept {
    const simd::E2m1Rounder to_e2m1;
    constexpr Index size = Format::group_size, width = codes_side_by_side;
    if (to.codes)
        for (Index c = 0; c < groups * size; c += width) {
            from.prefetch_in_encoder(c, width, groups * size);
            encode_columns<Format, quotient, width>(to_e2m1, from.x + c, steps + c / size, inverses + c / size, to.codes + c / 2);
        }
    if (to.values)
        for (Index group = 0; group < groups; ++group) round_group<Format, quotient>(to_e2m1, from.x + group * size, steps[group], inverses[group], to.values + group * size);
}

// Chunks whose scales are found together: the chain of operations from a largest magnitude to a step is long, and the processor works on several while it waits.
constexpr Index strip_chunks = 4;

// At most strip_chunks chunks of a row. False where a group holds what is not finite; nothing is written then.
template <class Format, bool by_reciprocal>
bool quantize_strip(Source from, Index chunks, const ScaleRule& rule, float tensor_scale, Targets to) noexcept {
    using namespace simd;
    if (chunks > strip_chunks) __builtin_unreachable();  // GCC warns of arrays that a fifth chunk would overrun
    Words amax[strip_chunks], largest{};
    for (Index k = 0; k < chunks; ++k) {
        from.prefetch_in_search(k * chunk_cols<Format>, chunk_cols<Format>, chunks * chunk_cols<Format>);
        amax[k] = group_maxima<Format>(from.x + k * chunk_cols<Format>);
        largest = max(largest, amax[k]);
    }
    if (any_at_least(largest, infinity_bits)) return false;
    alignas(64) std::uint8_t scales[strip_chunks * lanes];
    alignas(64) float steps[strip_chunks * lanes], inverses[strip_chunks * lanes];
    bool may_correct = has_fused;
    for (Index k = 0; k < chunks; ++k) {
        scales_of_chunk<Format>(from.x + k * chunk_cols<Format>, amax[k], rule, tensor_scale, scales + k * lanes);
        const Words bytes = load_bytes(scales + k * lanes);
        const Floats step = group_steps<Format>(bytes, tensor_scale);
        store(steps + k * lanes, step);
        store(inverses + k * lanes, by_reciprocal ? e8m0_reciprocals(bytes) : 1.0f / step);
        may_correct = may_correct && (by_reciprocal || moderate(amax[k], step));
    }
    if (to.scales) std::copy_n(scales, chunks * lanes, to.scales);
    if constexpr (by_reciprocal)
        write_groups<Format, Quotient::reciprocal>(from, chunks * lanes, steps, inverses, to);
    else if (may_correct)
        write_groups<Format, Quotient::corrected>(from, chunks * lanes, steps, inverses, to);
    else
        write_groups<Format, Quotient::division>(from, chunks * lanes, steps, inverses, to);
    return true;
}

// Adjacent groups of a row: strip by strip, and what is left over in a chunk of its own, filled up with zeros.
template <class Format, bool by_reciprocal>
bool quantize_groups(Source from, Index groups, const ScaleRule& rule, float tensor_scale, Targets to) noexcept {
    constexpr Index size = Format::group_size;
    while (groups >= simd::lanes) {
        const Index chunks = std::min(groups / simd::lanes, strip_chunks), done = chunks * simd::lanes;
        if (!quantize_strip<Format, by_reciprocal>(from, chunks, rule, tensor_scale, to)) return false;
        groups -= done;
        from.advance(done * size);
        to.advance(done, size);
    }
    if (groups == 0) return true;
    alignas(64) float rest[chunk_cols<Format>] = {};
    alignas(64) std::uint8_t codes[chunk_cols<Format> / 2], scales[simd::lanes];
    std::copy_n(from.x, groups * size, rest);
    if (!quantize_strip<Format, by_reciprocal>({rest, from.next, from.rotated}, 1, rule, tensor_scale, {to.codes ? codes : nullptr, scales, to.values ? rest : nullptr})) return false;
    if (to.scales) std::copy_n(scales, groups, to.scales);
    if (to.codes) std::copy_n(codes, groups * size / 2, to.codes);
    if (to.values) std::copy_n(rest, groups * size, to.values);
    return true;
}

// Calls f(std::bool_constant) with whether a format's steps under that tensor scale are powers of two.
template <class Format, class F>
void with_reciprocals(float tensor_scale, F&& f) {
    if constexpr (std::is_same_v<Format, Mxfp4>)
        if (tensor_scale == 1.0f) return f(std::true_type{});
    f(std::false_type{});
}

// Every row of x, rotated piece by piece where there is a rotation, through quantize_groups; to(row) gives the row's targets. Returns as quantize() does.
template <class Format, class RowTargets>
Index quantize_rows(const ScaleRule& rule, MatrixView<const float> x, const Rotation& rotation, float tensor_scale, int threads, RowTargets&& to) {
    if (rotation) rotation.check_columns(x.cols);
    const Index piece = rotation ? std::min(x.cols, std::lcm(strip_chunks * chunk_cols<Format>, rotation.block_size())) : x.cols;  // whole chunks and whole blocks
    FirstRow bad;
    with_reciprocals<Format>(tensor_scale, [&]<bool by_reciprocal>(std::bool_constant<by_reciprocal>) {
        parallel_for_ranges(x.rows, rows_a_piece(x.cols), threads, [&](Index begin, Index end) {
            const Buffer<float> room(rotation ? piece : 0);
            float* const rotated = room.data();
            for (Index r = begin; r < end; ++r) {
                Targets target = to(r);
                for (Index c = 0; c < x.cols; c += piece) {
                    const Index cols = std::min(piece, x.cols - c);
                    const float* values = x.row(r) + c;
                    if (rotation) rotation.rotate_and_prefetch(values, cols, rotated, values + cols);
                    const Source from = rotation ? Source{rotated, values + cols, true} : Source{values, values + strip_chunks * chunk_cols<Format>, false};
                    if (!quantize_groups<Format, by_reciprocal>(from, cols / Format::group_size, rule, tensor_scale, target)) return bad.note(r);
                    target.advance(cols / Format::group_size, Format::group_size);
                }
            }
        });
    });
    if (!bad.found()) return -1;
    // What is not finite is still there, even in place: its chunk was not written.
    const Index position = first_nonfinite(x, threads);
    if (position < 0) refuse_overflow(bad.row(), rotation.block_size());
    return position;
}

}  // namespace

float amax(MatrixView<const float> x, int threads, const Rotation& rotation) {
    if (rotation) rotation.check_columns(x.cols);
    const Index piece = rotation ? std::min(x.cols, std::lcm(Index{512}, rotation.block_size())) : x.cols;
    const Index rows = rows_a_piece(x.cols);
    std::vector<float> largest(static_cast<std::size_t>((x.rows + rows - 1) / rows), 0.0f);
    FirstRow bad;
    parallel_for_ranges(x.rows, rows, threads, [&](Index begin, Index end) {
        std::vector<float> rotated(static_cast<std::size_t>(rotation ? piece : 0));
        std::uint32_t mine = 0;
        for (Index r = begin; r < end; ++r) {
            if (!rotation) mine = std::max(mine, std::bit_cast<std::uint32_t>(group_amax(x.row(r), x.cols)));
            for (Index c = 0; rotation && c < x.cols; c += piece) mine = std::max(mine, rotation.rotate_piece(x.row(r) + c, std::min(piece, x.cols - c), rotated.data()));
            if (mine >= infinity_bits) return bad.note(r);
        }
        largest[static_cast<std::size_t>(begin / rows)] = std::bit_cast<float>(mine);
    });
    if (bad.found()) {
        if (rotation && first_nonfinite(x, threads) < 0) refuse_overflow(bad.row(), rotation.block_size());
        return std::numeric_limits<float>::quiet_NaN();
    }
    return largest.empty() ? 0.0f : *std::max_element(largest.begin(), largest.end());
}

Index quantize(std::string_view format, const ScaleRule& rule, MatrixView<const float> weight, float tensor_scale, MatrixView<std::uint8_t> codes, MatrixView<std::uint8_t> scales, int threads,
               const Rotation& rotation) {
    check_group_rule(rule);
    return with_format(format, [&]<class Format>(Format) {
        check_groups<const float>(weight, scales, Format::group_size, "weight");
        check_codes(codes, weight.rows, weight.cols);
        return quantize_rows<Format>(rule, weight, rotation, tensor_scale, threads, [&](Index r) { return Targets{codes.row(r), scales.row(r), nullptr}; });
    });
}

void find_scales(std::string_view format, const ScaleRule& rule, MatrixView<const float> weight, float tensor_scale, MatrixView<const double> hessian, MatrixView<std::uint8_t> scales, int threads,
                 const Rotation& rotation) {
    if (rotation) rotation.check_columns(weight.cols);
    with_format(format, [&]<class Format>(Format) {
        check_groups<const float>(weight, scales, Format::group_size, "weight");
        if (!needs_hessian(rule)) {
            quantize_rows<Format>(rule, weight, rotation, tensor_scale, threads, [&](Index r) { return Targets{nullptr, scales.row(r), nullptr}; });
            return;
        }
        constexpr Index size = Format::group_size;
        check(hessian.rows == weight.cols && hessian.cols == size, "the scale rule weighs errors by what a hessian holds of each group, (" + std::to_string(weight.cols) + ", " + std::to_string(size) +
                                                                       "); got (" + std::to_string(hessian.rows) + ", " + std::to_string(hessian.cols) + ")");
        parallel_for_ranges(weight.rows, rows_a_piece(weight.cols), threads, [&](Index begin, Index end) {
            const RotatedRows w(weight, rotation, begin, end - begin);
            for (Index r = begin; r < end; ++r)
                for (Index g = 0; g < scales.cols; ++g) {
                    const Index c = g * size;
                    scales.row(r)[g] = group_scale<Format>(w.row(r) + c, rule, tensor_scale, GroupMoment{hessian.row(c), hessian.row_stride});
                }
        });
    });
}

void encode(std::string_view format, MatrixView<const float> weight, MatrixView<const std::uint8_t> scales, float tensor_scale, MatrixView<std::uint8_t> codes, int threads, const Rotation& rotation) {
    if (rotation) rotation.check_columns(weight.cols);
    with_format(format, [&]<class Format>(Format) {
        check_groups(weight, scales, Format::group_size, "weight");
        check_codes(codes, weight.rows, weight.cols);
        parallel_for_ranges(weight.rows, rows_a_piece(weight.cols), threads, [&](Index begin, Index end) {
            const RotatedRows w(weight, rotation, begin, end - begin);
            const simd::E2m1Rounder to_e2m1;
            for (Index r = begin; r < end; ++r)
                for (Index g = 0; g < scales.cols; ++g) {
                    const Index c = g * Format::group_size;
                    const float step = group_step<Format>(scales.row(r)[g], tensor_scale);
                    encode_columns<Format, Quotient::division, Format::group_size>(to_e2m1, w.row(r) + c, &step, &step, codes.row(r) + c / 2);
                }
        });
    });
}

void dequantize(std::string_view format, MatrixView<const std::uint8_t> codes, MatrixView<const std::uint8_t> scales, float tensor_scale, MatrixView<float> out, int threads) {
    with_format(format, [&]<class Format>(Format) {
        check_groups(out, scales, Format::group_size, "codes");
        check_codes(codes, out.rows, out.cols);
        parallel_for_ranges(out.rows, rows_a_piece(out.cols), threads, [&](Index begin, Index end) {
            for (Index r = begin; r < end; ++r)
                for (Index g = 0; g < scales.cols; ++g) {
                    const Index c = g * Format::group_size;
                    decode_group<Format>(codes.row(r) + c / 2, group_step<Format>(scales.row(r)[g], tensor_scale), out.row(r) + c);
                }
        });
    });
}

Index round_to_grid(std::string_view format, const ScaleRule& rule, MatrixView<const float> x, float tensor_scale, MatrixView<float> out, int threads, const Rotation& rotation) {
    check_group_rule(rule);
    check(out.rows == x.rows && out.cols == x.cols, "round_to_grid: out has another shape than x");
    return with_format(format, [&]<class Format>(Format) {
        check(x.cols % Format::group_size == 0, "x has " + std::to_string(x.cols) + " columns; " + std::string(Format::name) + " needs a multiple of " + std::to_string(Format::group_size));
        return quantize_rows<Format>(rule, x, rotation, tensor_scale, threads, [&](Index r) { return Targets{nullptr, nullptr, out.row(r)}; });
    });
}

// Sums over all values of count numbers that terms(w, ŵ) makes of each, in float64 row by row: the same for any number of threads.
template <std::size_t count, class Terms>
static std::array<double, count> sums_over(std::string_view format, MatrixView<const float> weight, MatrixView<const std::uint8_t> codes, MatrixView<const std::uint8_t> scales, float tensor_scale, int threads,
                                           const Rotation& rotation, Terms&& terms) {
    if (rotation) rotation.check_columns(weight.cols);
    std::vector<std::array<double, count>> rows(static_cast<std::size_t>(weight.rows));
    with_format(format, [&]<class Format>(Format) {
        constexpr Index size = Format::group_size;
        check_groups(weight, scales, size, "weight");
        check_codes(codes, weight.rows, weight.cols);
        parallel_for_ranges(weight.rows, rows_a_piece(weight.cols), threads, [&](Index begin, Index end) {
            const RotatedRows rotated(weight, rotation, begin, end - begin);
            for (Index r = begin; r < end; ++r) {
                double of_columns[count][size] = {};  // of a group
                for (Index g = 0; g < scales.cols; ++g) {
                    const float* w = rotated.row(r) + g * size;
                    alignas(cache_line) float values[size];
                    decode_group<Format>(codes.row(r) + g * size / 2, group_step<Format>(scales.row(r)[g], tensor_scale), values);
#pragma GCC unroll 1  // a loop that is no more is not vectorised
                    for (Index i = 0; i < size; ++i) {
                        const std::array<double, count> own = terms(w[i], values[i]);
                        for (std::size_t k = 0; k < count; ++k) of_columns[k][i] += own[k];
                    }
                }
                for (std::size_t k = 0; k < count; ++k) rows[static_cast<std::size_t>(r)][k] = std::accumulate(of_columns[k], of_columns[k] + size, 0.0);
            }
        });
    });
    std::array<double, count> sums{};
    for (const auto& row : rows)
        for (std::size_t k = 0; k < count; ++k) sums[k] += row[k];
    return sums;
}

SquareSums square_sums(std::string_view format, MatrixView<const float> weight, MatrixView<const std::uint8_t> codes, MatrixView<const std::uint8_t> scales, float tensor_scale, int threads,
                       const Rotation& rotation) {
    const auto [error, energy] = sums_over<2>(format, weight, codes, scales, tensor_scale, threads, rotation, [](float w, float value) {
        const double apart = w - value, own = w;
        return std::array{apart * apart, own * own};
    });
    return {error, energy};
}

FitSums fit_sums(std::string_view format, MatrixView<const float> weight, MatrixView<const std::uint8_t> codes, MatrixView<const std::uint8_t> scales, float tensor_scale, int threads, const Rotation& rotation) {
    const auto [error, dot, square] = sums_over<3>(format, weight, codes, scales, tensor_scale, threads, rotation, [](float w, float value) {
        const double apart = w - value, own = w, wide = value;
        return std::array{apart * apart, own * wide, wide * wide};
    });
    return {error, dot, square};
}

}  // namespace mrgptq
