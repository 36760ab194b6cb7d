#!/bin/sh
# Builds the library and installs it for C and C++ programs:
#
#     bindings/c/install.sh PREFIX [cargo options]
#
# PREFIX/include  farface.h, farface.hpp
# PREFIX/lib      libfarface.a, libfarface.so (with soname), pkgconfig/farface.pc, cmake/farface
#
# DESTDIR is put before PREFIX while copying, LIBDIR names the library folder (default lib), CARGO
# the cargo to use. Without cargo options the bare library is built, with the default
# model in it: --no-default-features --features default-model.
set -eu

[ $# -ge 1 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
prefix=$1
case $prefix in
/*) ;;
*) echo "PREFIX must be absolute: $prefix" >&2; exit 2 ;;
esac
shift
[ $# -gt 0 ] || set -- --no-default-features --features default-model
root=$(cd "$(dirname "$0")/../.." && pwd)
libdir=${LIBDIR:-lib}
out=${DESTDIR:-}$prefix
cd "$root"
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
abi=$(sed -n 's/^#define FARFACE_ABI_VERSION \([0-9]*\)/\1/p' include/farface.h)

# Without the crate type for Rust programs, the whole library is optimised as one; by one code generator, which saves 3 % of a program.
export CARGO_PROFILE_RELEASE_CODEGEN_UNITS="${CARGO_PROFILE_RELEASE_CODEGEN_UNITS:-1}"
${CARGO:-cargo} rustc --release --lib --crate-type staticlib,cdylib "$@"
triple=${CARGO_BUILD_TARGET:-}
previous=
for option in "$@"; do
    if [ "$previous" = --target ]; then triple=$option; fi
    case $option in --target=*) triple=${option#*=} ;; esac
    previous=$option
done
built=${CARGO_TARGET_DIR:-target}/${triple:+$triple/}release

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out/include" "$out/$libdir/pkgconfig" "$out/$libdir/cmake/farface"
install -m 644 include/farface.h include/farface.hpp "$out/include/"

# One object whose only global names are the header's functions: nothing in the archive can clash
# with another library, another Rust one included. COMDAT groups are dissolved, as their names would
# stay shared otherwise.
case $(uname -s) in
Linux)
    nm -g --defined-only "$built/libfarface.a" 2>/dev/null |
        awk '$2 == "T" && $3 ~ /^farface_/ { print $3 }' | sort -u > "$work/names"
    # shellcheck disable=SC2046 # one option a name
    ${LD:-ld} -r --force-group-allocation $(sed 's/^/-u /' "$work/names") \
        "$built/libfarface.a" -o "$work/farface.o"
    # The standard library brings intermediate code along, on which some tools of other versions choke.
    ${OBJCOPY:-objcopy} --strip-debug --remove-section=.llvmbc --remove-section=.llvmcmd \
        --keep-global-symbols="$work/names" "$work/farface.o"
    rm -f "$out/$libdir/libfarface.a"
    ${AR:-ar} crs "$out/$libdir/libfarface.a" "$work/farface.o"
    install -m 755 "$built/libfarface.so" "$out/$libdir/libfarface.so.$version"
    ${STRIP:-strip} --strip-unneeded "$out/$libdir/libfarface.so.$version"
    ln -sf "libfarface.so.$version" "$out/$libdir/libfarface.so.$abi"
    ln -sf "libfarface.so.$abi" "$out/$libdir/libfarface.so"
    shared=libfarface.so.$version
    system='-lpthread -ldl -lm'
    ;;
Darwin)
    install -m 644 "$built/libfarface.a" "$out/$libdir/"
    install -m 755 "$built/libfarface.dylib" "$out/$libdir/libfarface.$abi.dylib"
    ln -sf "libfarface.$abi.dylib" "$out/$libdir/libfarface.dylib"
    shared=libfarface.$abi.dylib
    system='-liconv -lm'
    ;;
*)
    echo "install.sh knows Linux and macOS; elsewhere copy $built and include by hand" >&2
    exit 1
    ;;
esac

for file in farface.pc:pkgconfig/farface.pc farface-config.cmake:cmake/farface/farface-config.cmake \
    farface-config-version.cmake:cmake/farface/farface-config-version.cmake; do
    sed -e "s|@PREFIX@|$prefix|g" -e "s|@LIBDIR@|$libdir|g" -e "s|@VERSION@|$version|g" \
        -e "s|@SHARED@|$shared|g" -e "s|@SYSTEM@|$system|g" \
        "bindings/c/${file%%:*}.in" > "$out/$libdir/${file#*:}"
done
echo "farface $version is in $out"
