// Pairs of codes, tiles of codes and of scales: what is packed comes back, each byte where the definition puts it and nothing beside it.
#include <vector>

#include "codecs/packing.h"
#include "input.h"
#include "matmul/tiles.h"
#include "simd/nibbles.h"

namespace mrgptq {
namespace {

using fuzz::Input, fuzz::Matrix, fuzz::require, testing::Layout;

void pairs(Input& input) {
    const Index cols = 2 * input.number(0, 100);
    std::vector<std::uint8_t> packed(static_cast<std::size_t>(cols / 2)), codes(static_cast<std::size_t>(cols)), again(static_cast<std::size_t>(cols / 2));
    for (std::uint8_t& byte : packed) byte = input.byte();
    unpack_row(packed.data(), cols, codes.data());
    for (std::size_t c = 0; c < codes.size(); ++c) require(codes[c] == (packed[c / 2] >> (c % 2 * 4) & 15), "a code is not its nibble");
    pack_row(codes.data(), cols, again.data());
    require(packed == again, "pairs do not come back");
    for (std::size_t first = 0; first + 16 <= codes.size(); first += 16) {
        const simd::Codes sixteen = simd::unpack_nibbles(packed.data() + first / 2);
        std::uint32_t lanes[16];
        for (int i = 0; i < simd::vectors_of_16; ++i) simd::store(lanes + i * simd::lanes, sixteen.v[i]);
        for (std::size_t i = 0; i < 16; ++i) require((lanes[i] & 15) == codes[first + i], "a lane is not its code");
        simd::Codes masked = sixteen;
        for (auto& vector : masked.v) vector &= 15u;
        std::uint8_t eight[8];
        simd::pack_nibbles(masked, eight);
        require(std::memcmp(eight, packed.data() + first / 2, 8) == 0, "lanes do not come back");
    }
}

// Byte `byte` of row `row`; 0 behind the last of either.
std::uint32_t byte_of(const Matrix<std::uint8_t>& rows, Index row, Index byte) { return row < rows.view().rows && byte < rows.view().cols ? rows(row, byte) : 0u; }

void require_tiles_of(const Matrix<std::uint8_t>& rows, const Matrix<std::uint32_t>& tiles) {
    for (Index tile = 0; tile < tiles.view().rows; ++tile) {
        const std::uint32_t* found = tiles.view().row(tile);
        for (Index word = 0; word < tiles.view().cols / tile_rows; ++word)
            for (Index r = 0; r < tile_rows; ++r) {
                std::uint32_t expected = 0;
                for (Index byte = 0; byte < 4; ++byte) expected |= byte_of(rows, tile_rows * tile + r, 4 * word + byte) << (8 * byte);
                require(*found++ == expected, "a word of a tile is not its four bytes");
            }
    }
}

void tiles(Input& input) {
    const auto format = input.one_of<std::string_view>({Mxfp4::name, Nvfp4::name});
    const Index group_size = with_format(format, [](auto f) { return decltype(f)::group_size; }), rows = input.number(1, 40), groups = input.number(1, 9);
    const Layout from = input.layout(), to = input.layout();
    const int threads = input.threads();
    Matrix<std::uint8_t> codes(rows, groups * group_size / 2, from, 0x77), scales(rows, groups, from, 0x77);
    input.fill(codes);
    input.fill(scales);
    Matrix<std::uint32_t> code_tiles(tiles_of(rows), groups * group_size / codes_a_word * tile_rows, to, 0x77777777u), scale_tiles(tiles_of(rows), scale_words(groups) * tile_rows, to, 0x77777777u);
    make_tiles({format, codes.view(), scales.view()}, code_tiles.view(), scale_tiles.view(), threads);
    require_tiles_of(codes, code_tiles);
    require_tiles_of(scales, scale_tiles);
    require(code_tiles.padding_untouched() && scale_tiles.padding_untouched(), "something beside the tiles was written");
    Matrix<std::uint8_t> codes_again(rows, codes.view().cols, to, 0x77), scales_again(rows, groups, to, 0x77);
    read_tiles({format, rows, code_tiles.view(), scale_tiles.view()}, codes_again.view(), scales_again.view(), threads);
    require(codes_again == codes && scales_again == scales, "tiles do not come back");
    require(codes_again.padding_untouched() && scales_again.padding_untouched(), "something beside the rows was written");
}

}  // namespace
}  // namespace mrgptq

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    mrgptq::fuzz::Input input(data, size);
    if (input.byte() % 2)
        mrgptq::pairs(input);
    else
        mrgptq::tiles(input);
    return 0;
}
