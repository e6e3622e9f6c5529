// Products with any codes and scales: the same from rows and from tiles, of a token among others and alone, for any number of threads; and near the sum in float64 where nothing is too large or too small.
#include "codecs/codec.h"
#include "input.h"
#include "matmul/integer.h"
#include "matmul/matmul.h"
#include "matmul/tiles.h"

namespace mrgptq {
namespace {

using fuzz::Input, fuzz::Matrix, fuzz::require, fuzz::same, testing::Layout;

constexpr float no_number = std::numeric_limits<float>::quiet_NaN();

struct Packed {
    std::string_view format;
    Index group_size;
    Matrix<std::uint8_t> codes, scales;
    float divisor;

    Packed(Input& input, Index rows, Index cols, Layout layout)
        : format(input.one_of<std::string_view>({Mxfp4::name, Nvfp4::name})), group_size(with_format(format, [](auto f) { return decltype(f)::group_size; })), codes(rows, cols / 2, layout, 0x77),
          scales(rows, cols / group_size, layout, 0x77), divisor(input.divisor(format)) {
        input.fill_scales(scales);
        input.fill(codes);
    }
    PackedMatrix view() const { return {format, codes.view(), scales.view(), divisor}; }
};

template <class Product>
void require_one_answer(Input& input, const PackedMatrix& weight, Index tokens, Matrix<float>& out, Product&& product) {
    const Layout layout = input.layout();
    Matrix<std::uint32_t> codes(tiles_of(weight.codes.rows), weight.codes.cols / 4 * tile_rows, layout, 0x77777777u), scales(tiles_of(weight.codes.rows), scale_words(weight.scales.cols) * tile_rows, layout, 0x77777777u);
    make_tiles(weight, codes.view(), scales.view(), 1);
    const Weight tiled(TiledMatrix{weight.format, weight.codes.rows, codes.view(), scales.view(), weight.tensor_scale});
    product(Index{0}, tokens, Weight(weight), out.view(), 1);
    Matrix<float> other(tokens, weight.codes.rows, layout, no_number);
    product(Index{0}, tokens, tiled, other.view(), input.threads());
    require(same(out, other), "tiles give another product than rows");
    require(other.padding_untouched(), "something beside the product was written");
    const Index token = input.number(0, tokens - 1);
    const bool from_tiles = input.byte() % 2;
    Matrix<float> alone(1, weight.codes.rows);
    product(token, Index{1}, from_tiles ? tiled : Weight(weight), alone.view(), 1);
    for (Index r = 0; r < weight.codes.rows; ++r) require(same(alone(0, r), out(token, r)), "a token alone has another product than among others");
}

MatrixView<const float> some(const Matrix<float>& x, Index first, Index count) { return {x.view().row(first), count, x.view().cols, x.view().row_stride}; }

PackedMatrix some(const Packed& x, Index first, Index count) {
    const auto rows = [&](const Matrix<std::uint8_t>& from) { return MatrixView<const std::uint8_t>{from.view().row(first), count, from.view().cols, from.view().row_stride}; };
    return {x.format, rows(x.codes), rows(x.scales), x.divisor};
}

// What codes and scales stand for; no number where a step, which products need not round, is lost below float32's range.
Matrix<float> values_of(const Packed& packed) {
    Matrix<float> values(packed.codes.view().rows, packed.codes.view().cols * 2);
    dequantize(packed.format, packed.codes.view(), packed.scales.view(), packed.divisor, values.view(), 1);
    for (Index r = 0; r < values.view().rows; ++r)
        for (Index c = 0; c < values.view().cols; ++c)
            if (values(r, c) == 0 && (packed.codes(r, c / 2) >> (c % 2 * 4) & 7) != 0) values(r, c) = no_number;
    return values;
}

// A sum of n products in float32 is off by at most n units of 2^-24, roundings of the steps' products among them; doubled for what is of second order.
void require_near(const Matrix<float>& x, const Packed& weight, const Matrix<float>& out) {
    const Index rows = weight.codes.view().rows, cols = x.view().cols;
    const Matrix<float> values = values_of(weight);
    const auto moderate = [](float v) { return v == 0 || (std::fabs(v) > 1e-15f && std::fabs(v) < 1e15f); };
    for (Index t = 0; t < x.view().rows; ++t)
        for (Index r = 0; r < rows; ++r) {
            const float *const token = x.view().row(t), *const row = values.view().row(r);
            double sum = 0, size = 0;
            Index c = 0;
            for (; c < cols && moderate(token[c]) && moderate(row[c]); ++c) {
                const double term = static_cast<double>(token[c]) * row[c];
                sum += term;
                size += std::fabs(term);
            }
            if (c == cols) require(std::fabs(out(t, r) - sum) <= 2 * static_cast<double>(cols + 4) * 0x1p-24 * size, "a product is far from its sum");
        }
}

}  // namespace
}  // namespace mrgptq

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    using namespace mrgptq;
    fuzz::Input input(data, size);
    const std::uint8_t kind = input.byte() % 3;
    const Index rows = input.number(1, 40), cols = 32 * input.number(1, input.one_of<Index>({2, 2, 2, 6})), tokens = input.number(1, input.byte() % 64 == 0 ? 70 : 5);
    const Packed weight(input, rows, cols, input.layout());
    Matrix<float> out(tokens, rows);
    if (kind == 2) {
        const Packed x(input, tokens, cols, input.layout());
        require_one_answer(input, weight.view(), tokens, out, [&](Index first, Index count, const Weight& w, MatrixView<float> to, int threads) { matmul_packed(some(x, first, count), w, to, threads); });
        require_near(values_of(x), weight, out);
        return 0;
    }
    Matrix<float> x(tokens, cols, input.layout(), no_number);
    input.fill(x, kind == 1);
    require_one_answer(input, weight.view(), tokens, out, [&](Index first, Index count, const Weight& w, MatrixView<float> to, int threads) {
        if (kind == 0)
            matmul(some(x, first, count), w, to, threads);
        else
            matmul_int8(some(x, first, count), w, to, threads);
    });
    if (kind == 0) require_near(x, weight, out);
    return 0;
}
