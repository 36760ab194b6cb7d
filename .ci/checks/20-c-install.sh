#!/bin/sh
# Installs the library into a temporary folder as a packager would, and builds programs from there:
# by pkg-config and by CMake, statically and dynamically, beside another Rust library. A program
# with the static library must stay small.
set -eu
cd "$(dirname "$0")/../.."
. .ci/c-common.sh
need cmake cmake
need pkg-config pkg-config
most=2000000 # bytes of a stripped static program: the model, and kernels of three kinds of numbers for every instruction set

bindings/c/install.sh "$work/prefix"
export PKG_CONFIG_PATH="$work/prefix/lib/pkgconfig"
inputs

flags="$(pkg-config --cflags farface)"
shared="$(pkg-config --libs farface) -Wl,-rpath,$work/prefix/lib"
static="-Wl,--gc-sections -Wl,-Bstatic -lfarface -Wl,-Bdynamic"
static="-L$work/prefix/lib $static $(pkg-config --static --libs-only-l farface | sed 's/-lfarface//')"
# shellcheck disable=SC2086 # flags are words
{
    cc -O2 $flags examples/detect.c -o "$work/c-shared" $shared
    cc -O2 $flags examples/detect.c -o "$work/c-static" $static
    c++ -std=c++11 -O2 $flags examples/detect.cpp -o "$work/cpp-shared" $shared
    c++ -std=c++11 -O2 $flags examples/detect.cpp -o "$work/cpp-static" $static
}

mkdir "$work/cmake"
cat > "$work/cmake/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.10)
project(detect C CXX)
find_package(farface 0.1 REQUIRED)
add_executable(cmake-shared $PWD/examples/detect.c)
target_link_libraries(cmake-shared farface::farface)
add_executable(cmake-static $PWD/examples/detect.cpp)
target_compile_features(cmake-static PRIVATE cxx_std_11)
target_link_libraries(cmake-static farface::farface-static)
END
cmake -S "$work/cmake" -B "$work/cmake" -DCMAKE_PREFIX_PATH="$work/prefix" > "$work/cmake.log" ||
    { cat "$work/cmake.log"; exit 1; }
cmake --build "$work/cmake" >> "$work/cmake.log" || { cat "$work/cmake.log"; exit 1; }

"$work/c-shared" "$work/model.safetensors" "$work/picture.ppm" > "$work/wanted"
[ -s "$work/wanted" ] || { echo "no face found"; exit 1; }
for program in c-static cpp-shared cpp-static cmake/cmake-shared cmake/cmake-static; do
    "$work/$program" "$work/model.safetensors" "$work/picture.ppm" > "$work/found"
    cmp "$work/wanted" "$work/found" || { echo "$program differs"; exit 1; }
done
echo "$(wc -l < "$work/wanted") faces by all programs"

# Nothing else is global in the archive, and another Rust library fits beside all of it.
nm -g --defined-only "$work/prefix/lib/libfarface.a" | awk 'NF == 3 { print $3 }' | sort > "$work/globals"
cmp tests/c/symbols.txt "$work/globals"
cat > "$work/other.rs" <<'END'
#[no_mangle]
pub extern "C" fn other_library(n: u32) -> u32 {
    let fails = || if n > 0 { std::panic::panic_any(n) } else { std::thread::spawn(|| 7).join().unwrap() };
    std::panic::catch_unwind(fails).unwrap_or_else(|e| *e.downcast::<u32>().unwrap())
}
END
cat > "$work/both.c" <<'END'
#include <farface.h>
uint32_t other_library(uint32_t n);
int main(void)
{
    farface_model *model;
    return !(other_library(0) == 7 && other_library(5) == 5 &&
             farface_model_load("none", &model) == FARFACE_ERROR_IO && farface_last_error()[0] != 0);
}
END
rustc -O --crate-type staticlib "$work/other.rs" -o "$work/libother.a"
for order in "-lfarface -lother" "-lother -lfarface"; do
    # shellcheck disable=SC2086
    cc $flags "$work/both.c" -o "$work/both" -L"$work" -L"$work/prefix/lib" \
        -Wl,-Bstatic -Wl,--whole-archive $order -Wl,--no-whole-archive -Wl,-Bdynamic -lpthread -ldl -lm \
        -lgcc_s
    "$work/both" 2> "$work/panics" || { echo "two Rust libraries in one program: $order"; exit 1; }
done

strip "$work/c-static"
size=$(wc -c < "$work/c-static")
echo "static C program, stripped: $size bytes (at most $most); shared library: $(wc -c < "$work/prefix/lib/libfarface.so") bytes"
[ "$size" -le "$most" ]
