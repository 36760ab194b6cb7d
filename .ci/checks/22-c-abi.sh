#!/bin/sh
# Compares the shared library with that of the last release: nothing that a compiled program uses
# may have gone or changed, and a program compiled then must run with the library of now.
set -eu
cd "$(dirname "$0")/../.."
. .ci/c-common.sh

git rev-parse HEAD > /dev/null
tag=$(git tag --merged HEAD --sort=-v:refname --list 'v[0-9]*' | head -n 1)
if [ -z "$tag" ]; then
    echo "no release tag yet: nothing to compare with"
    exit 0
fi
abi() { sed -n 's/^#define FARFACE_ABI_VERSION //p' "$1/include/farface.h"; }
need abidiff abigail-tools
git worktree add --quiet --detach "$work/old" "$tag"
trap 'git worktree remove --force "$work/old"; rm -rf "$work"' EXIT
if [ "$(abi .)" != "$(abi "$work/old")" ]; then
    echo "ABI version $(abi .) against $(abi "$work/old") of $tag: a new one may differ"
    exit 0
fi
# With debug information, so that structs are compared too.
build() { # FOLDER NAME
    (cd "$1" && CARGO_PROFILE_RELEASE_DEBUG=true CARGO_PROFILE_RELEASE_STRIP=none \
        CARGO_TARGET_DIR="$work/target-$2" \
        cargo rustc --quiet --release --lib --no-default-features --crate-type cdylib)
    mkdir "$work/$2"
    cp "$work/target-$2/release/libfarface.so" "$work/$2/libfarface.so.0"
}
build "$work/old" then
build . now

# Exit bits: 1, 2 error; 4 changed; 8 changed incompatibly. Additions are welcome.
status=0
abidiff --no-added-syms --headers-dir1 "$work/old/include" --headers-dir2 include \
    "$work/then/libfarface.so.0" "$work/now/libfarface.so.0" || status=$?
[ $((status & 11)) -eq 0 ] || { echo "the interface of $tag is broken (abidiff: $status)"; exit 1; }

inputs
cc -std=c99 -I"$work/old/include" "$work/old/examples/detect.c" -o "$work/detect" "$work/then/libfarface.so.0"
for library in then now; do
    LD_LIBRARY_PATH="$work/$library" "$work/detect" "$work/model.safetensors" "$work/picture.ppm" > "$work/$library.txt"
done
[ -s "$work/now.txt" ] || { echo "the program of $tag finds no face with the library of now"; exit 1; }
echo "a program of $tag runs with the library of now"
