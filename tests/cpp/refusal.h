// What a refusal must say.
#pragma once

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

namespace mrgptq::testing {

// `call` throws std::invalid_argument, and `words` stand in its message.
template <class Call>
void expect_refused(const std::string& words, Call&& call) {
    try {
        call();
        ADD_FAILURE() << "taken, where it should say: " << words;
    } catch (const std::invalid_argument& error) {
        EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << "says \"" << error.what() << "\", not \"" << words << '"';
    }
}

}  // namespace mrgptq::testing
