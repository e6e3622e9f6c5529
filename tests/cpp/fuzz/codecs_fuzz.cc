// Codes and scales of any floats, and floats of any codes and scales: equal to the definitions of formats/ and codecs/scale_rule.h, one number at a time.
#include <stdexcept>

#include "codecs/codec.h"
#include "input.h"

namespace mrgptq {
namespace {

using fuzz::Input, fuzz::Matrix, fuzz::require, fuzz::same, testing::Layout;

constexpr float no_number = std::numeric_limits<float>::quiet_NaN();

std::uint8_t code_of(const std::uint8_t* packed, Index c) { return packed[c / 2] >> (c % 2 * 4) & 15; }

// -1, or where the first number that is none lies.
Index first_bad(const Matrix<float>& x) {
    for (Index r = 0; r < x.view().rows; ++r)
        for (Index c = 0; c < x.view().cols; ++c)
            if (!std::isfinite(x(r, c))) return r * x.view().cols + c;
    return -1;
}

template <class Format>
void require_codes(const Matrix<float>& x, const Matrix<std::uint8_t>& scales, float divisor, const Matrix<std::uint8_t>& codes) {
    for (Index r = 0; r < x.view().rows; ++r) {
        const float* const row = x.view().row(r);
        const std::uint8_t* const packed = codes.view().row(r);
        for (Index c = 0; c < x.view().cols; ++c) {
            const float quotient = row[c] / group_step<Format>(scales(r, c / Format::group_size), divisor);
            if (!std::isnan(quotient)) require(code_of(packed, c) == e2m1::encode(quotient), "a code is not the nearest");
        }
    }
}

template <class Format>
void require_values(const Matrix<std::uint8_t>& codes, const Matrix<std::uint8_t>& scales, float divisor, const Matrix<float>& values) {
    for (Index r = 0; r < values.view().rows; ++r) {
        const float* const row = values.view().row(r);
        const std::uint8_t* const packed = codes.view().row(r);
        for (Index c = 0; c < values.view().cols; ++c) require(same(row[c], group_step<Format>(scales(r, c / Format::group_size), divisor) * e2m1::decode(code_of(packed, c))), "a value is not its step times its code");
    }
}

template <class Format>
void quantise(Input& input) {
    constexpr Index size = Format::group_size;
    const ScaleRule rule{input.one_of({ScaleSearch::absmax, ScaleSearch::mse, ScaleSearch::fpquant_mse, ScaleSearch::four_over_six, ScaleSearch::quest}), input.one_of({MxRule::floor, MxRule::ceil, MxRule::even, MxRule::four_thirds}),
                         input.byte() % 8 == 0};
    const Index rows = input.number(1, 2), groups = input.number(1, input.one_of<Index>({3, 3, 3, 3, 3, 3, 18, 80})), cols = groups * size;
    Index block = input.one_of<Index>({0, 0, 0, 16, 32, 64, 128});
    if (block != 0 && cols % block != 0) block = 0;
    const Rotation rotation(block);
    const Layout layout = input.layout();
    const int threads = input.threads();
    const float divisor = input.divisor(Format::name);
    Matrix<float> x(rows, cols, layout, no_number), turned(rows, cols);
    input.fill(x, false);
    Matrix<std::uint8_t> codes(rows, cols / 2, layout, 0x77), scales(rows, groups, layout, 0x77);
    const Index bad = first_bad(x);
    bool overflows = false;
    try {
        if (rotation) rotate_columns(x.view(), rotation, turned.view(), 1);
    } catch (const std::invalid_argument&) {
        overflows = true;
    }
    if (!rotation) turned = Matrix<float>(x, testing::contiguous);
    try {
        require(quantize(Format::name, rule, x.view(), divisor, codes.view(), scales.view(), threads, rotation) == bad, "another number is told to be none");
        require(!overflows || bad >= 0, "a rotation that overflows is not refused");
    } catch (const std::invalid_argument&) {
        require(overflows, "a rotation is refused that does not overflow");
    }
    require(codes.padding_untouched() && scales.padding_untouched(), "something beside codes and scales was written");
    if (bad >= 0 || overflows) return;
    for (Index r = 0; r < rows; ++r)
        for (Index g = 0; g < groups; ++g) require(scales(r, g) == group_scale<Format>(turned.view().row(r) + g * size, rule, divisor), "a scale is not the rule's");
    require_codes<Format>(turned, scales, divisor, codes);
    Matrix<std::uint8_t> found(rows, groups, layout, 0x77);
    find_scales(Format::name, rule, x.view(), divisor, {nullptr, 0, 0, 0}, found.view(), threads, rotation);
    require(found == scales, "scales alone are others");
    Matrix<float> rounded(rows, cols, layout, no_number), values(rows, cols, layout, no_number);
    require(round_to_grid(Format::name, rule, x.view(), divisor, rounded.view(), threads, rotation) == -1, "rounding finds what quantising does not");
    dequantize(Format::name, codes.view(), scales.view(), divisor, values.view(), threads);
    require(same(rounded, values), "rounding is not quantising and back");
    require(rounded.padding_untouched() && values.padding_untouched(), "something beside the values was written");
    require_values<Format>(codes, scales, divisor, values);
}

// Any codes and scales, NaN among them.
template <class Format>
void decode(Input& input) {
    const Index rows = input.number(1, 4), groups = input.number(1, 9), cols = groups * Format::group_size;
    const Layout layout = input.layout();
    const int threads = input.threads();
    const float divisor = input.divisor(Format::name);
    Matrix<std::uint8_t> codes(rows, cols / 2, layout, 0x77), scales(rows, groups, layout, 0x77), encoded(rows, cols / 2, layout, 0x77);
    input.fill_scales(scales);
    input.fill(codes);
    Matrix<float> values(rows, cols, layout, no_number), x(rows, cols, layout, no_number);
    input.fill(x, true);
    dequantize(Format::name, codes.view(), scales.view(), divisor, values.view(), threads);
    require_values<Format>(codes, scales, divisor, values);
    encode(Format::name, x.view(), scales.view(), divisor, encoded.view(), threads);
    require_codes<Format>(x, scales, divisor, encoded);
    require(values.padding_untouched() && encoded.padding_untouched(), "something beside values and codes was written");
    // Rows are summed one by one and their sums added, so the parts add up to the whole bit for bit.
    const SquareSums whole = square_sums(Format::name, x.view(), codes.view(), scales.view(), divisor, threads);
    SquareSums parts;
    for (Index r = 0; r < rows; ++r) {
        const SquareSums own = square_sums(Format::name, {x.view().row(r), 1, cols, cols}, {codes.view().row(r), 1, cols / 2, cols / 2}, {scales.view().row(r), 1, groups, groups}, divisor, 1);
        parts.error += own.error;
        parts.energy += own.energy;
    }
    require((whole.error == parts.error || (std::isnan(whole.error) && std::isnan(parts.error))) && whole.energy == parts.energy, "the sums of rows are not the sum");
}

}  // namespace
}  // namespace mrgptq

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace mrgptq;
    fuzz::Input input(data, size);
    switch (input.byte() % 4) {
        case 0: quantise<Mxfp4>(input); break;
        case 1: quantise<Nvfp4>(input); break;
        case 2: decode<Mxfp4>(input); break;
        default: decode<Nvfp4>(input);
    }
    return 0;
}
