#!/bin/sh
# The C example and a program that calls everything, under valgrind and AddressSanitizer: no error,
# no byte lost. Prints the peak memory.
set -eu
cd "$(dirname "$0")/../.."
. .ci/c-common.sh
need valgrind valgrind
[ -x /usr/bin/time ] || need /usr/bin/time time

bindings/c/install.sh "$work/prefix"
inputs
build() { # PROGRAM SOURCE FLAGS...
    program=$1 source=$2
    shift 2
    cc -std=c99 -g -O1 "$@" -I"$work/prefix/include" "$source" -o "$work/$program" \
        "$work/prefix/lib/libfarface.a" -lpthread -ldl -lm
}
build detect examples/detect.c
build lifetimes tests/c/lifetimes.c
build detect-asan examples/detect.c -fsanitize=address,undefined -fno-sanitize-recover=all
build lifetimes-asan tests/c/lifetimes.c -fsanitize=address,undefined -fno-sanitize-recover=all

# valgrind may know less instructions than the processor.
export FARFACE_ISA=avx2
checker="valgrind --quiet --leak-check=full --show-leak-kinds=all --errors-for-leak-kinds=all --error-exitcode=9"
"$work/detect" "$work/model.safetensors" "$work/picture.ppm" > "$work/wanted"
[ -s "$work/wanted" ] || { echo "no face found"; exit 1; }
$checker "$work/detect" "$work/model.safetensors" "$work/picture.ppm" > "$work/found"
cmp "$work/wanted" "$work/found"
$checker "$work/lifetimes" "$work/model.safetensors"
echo "valgrind: clean"
unset FARFACE_ISA
"$work/detect" "$work/model.safetensors" "$work/picture.ppm" > "$work/wanted"

export ASAN_OPTIONS=detect_leaks=1
"$work/detect-asan" "$work/model.safetensors" "$work/picture.ppm" > "$work/found"
cmp "$work/wanted" "$work/found"
"$work/lifetimes-asan" "$work/model.safetensors"
echo "AddressSanitizer: clean"

echo "picture: $(sed -n 3p "$work/picture.ppm") px"
/usr/bin/time -f "peak memory of the C example: %M KiB" \
    "$work/detect" "$work/model.safetensors" "$work/picture.ppm" > /dev/null
