#!/usr/bin/env bash
# Builds the bare library for 64- and 32-bit Arm and runs its tests under emulation.
#
# Needs Debian 12 on amd64. The compiler is the distribution's rustc-web with the standard library of
# the very same package version for each target, unpacked below target/cross: the Rust in use stays
# as it is. C linkers and QEMU come from the distribution too; what is missing is installed, which
# needs root. A second run downloads nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

# Integration tests to run beside the unit tests, as far as they exist.
integration=(parity)

# Oldest compiler that Cargo.toml allows.
oldest=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

cache=$(realpath -m "${CARGO_TARGET_DIR:-target}")/cross
toolchain=$cache/toolchain

# The signed package index of an architecture lags at times. These packages may then be taken from
# the archive by name; the checksum says that they are the ones this script was written with.
known_packages="
02419380801b9f61391294823659b17b90f7a863ca3bbccb9140d2f0f8a2c910  libstd-rust-web-dev_1.96.0+dfsg1-1~deb12u2_arm64.deb
b9f9dd1d03a903680f918cb2bba00a2a3d76558545d5e6a8061072ab461bb989  libstd-rust-web-dev_1.96.0+dfsg1-1~deb12u2_armhf.deb
"

die() {
    echo "cross: $*" >&2
    exit 1
}

# apt for one architecture, on lists of its own: the system's architectures and lists stay untouched.
apt_for() { # architecture, program, arguments
    local state=$cache/apt/$1
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial"
    "$2" -q -o APT::Architecture="$1" -o APT::Architectures="$1" -o Dir::State::lists="$state/lists" \
        -o Dir::Cache="$state/cache" -o APT::Sandbox::User=root "${@:3}"
}

# Downloads package $2 in version $3 for architecture $1.
download() {
    local file=$2_$3_$1.deb url sum
    apt_for "$1" apt-get update >"$cache/apt-$1.log" 2>&1 || true # what matters is checked next
    if apt_for "$1" apt-get download "$2=$3" >>"$cache/apt-$1.log" 2>&1; then
        return
    fi
    sum=$(grep -F "  $file" <<<"$known_packages") ||
        die "the package index for $1 has no $2 $3 (see $cache/apt-$1.log)"
    # Elsewhere, since apt names no address for a file that is already here.
    url=$(cd / && apt_for amd64 apt-get download --print-uris "$2=$3" |
        sed -n "s/^'\([^']*\)_amd64\.deb'.*/\1_$1.deb/p")
    echo "$2 $3 is not in the index for $1: taken from the archive by its checksum"
    curl -fsSL --retry 3 -o "$file" "$url"
    sha256sum --check --quiet - <<<"$sum"
}

install_tools() {
    local wanted=()
    command -v aarch64-linux-gnu-gcc >/dev/null || wanted+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
    command -v arm-linux-gnueabihf-gcc >/dev/null || wanted+=(gcc-arm-linux-gnueabihf libc6-dev-armhf-cross)
    command -v qemu-aarch64-static >/dev/null || wanted+=(qemu-user-static)
    command -v curl >/dev/null || wanted+=(curl ca-certificates)
    if ! [ -x "$toolchain/rustc" ]; then
        wanted+=(libedit2 libffi8 libxml2 libz3-4 libzstd1) # what LLVM links to
    fi
    if [ ${#wanted[@]} -ne 0 ]; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get -q update >"$cache/apt-install.log" 2>&1 || true
        apt-get -q install -y --no-install-recommends -o DPkg::Lock::Timeout=600 "${wanted[@]}" >>"$cache/apt-install.log" 2>&1 ||
            die "cannot install ${wanted[*]} (see $cache/apt-install.log)"
    fi
}

install_rust() {
    if [ -x "$toolchain/rustc" ]; then
        return
    fi
    [ "$(dpkg --print-architecture)" = amd64 ] || die "the host must be amd64"
    local debs=$cache/debs new=$toolchain.new version llvm package
    rm -rf "$debs" "$new" "$toolchain"
    mkdir -p "$debs" "$new"
    cd "$debs"
    apt_for amd64 apt-get update >"$cache/apt-amd64.log" 2>&1 || true
    version=$(apt_for amd64 apt-cache policy rustc-web | awk '/Candidate:/ { print $2 }')
    dpkg --compare-versions "${version:-0}" ge "$oldest" || die "rustc-web is ${version:-absent}, not >= $oldest"
    package=libstd-rust-web-$(cut -d. -f1,2 <<<"$version")
    llvm=$(apt_for amd64 apt-cache depends "$package=$version" | awk '/Depends: libllvm/ { print $2 }')
    apt_for amd64 apt-get download "rustc-web=$version" "libstd-rust-web-dev=$version" "$package=$version" "$llvm" \
        >>"$cache/apt-amd64.log" 2>&1 || die "cannot download rustc-web $version (see $cache/apt-amd64.log)"
    download arm64 libstd-rust-web-dev "$version"
    download armhf libstd-rust-web-dev "$version"
    for package in *.deb; do
        dpkg -x "$package" "$new"
    done
    cat >"$new/rustc" <<'END'
#!/bin/sh
root=$(dirname "$0")
LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu exec "$root/usr/bin/rustc" "$@"
END
    chmod +x "$new/rustc"
    cd "$OLDPWD"
    rm -rf "$debs" "$cache/apt"
    mv "$new" "$toolchain"
}

# Library, then tests, for target $1 on the emulator $2.
check_target() {
    local target=$1 emulator=$2 passed tests=(--lib) name start=$SECONDS
    local log=$cache/$target.log
    echo "== $target: library"
    cargo build --release "${alike[@]}" "${checked[@]}" --no-default-features --lib --target "$target"
    for name in a so; do
        [ -s "$CARGO_TARGET_DIR/$target/release/libfarface.$name" ] || die "$target: no libfarface.$name"
    done
    for name in "${integration[@]}"; do
        if [ -e "tests/$name.rs" ] || [ -e "tests/$name/main.rs" ]; then
            tests+=(--test "$name")
        fi
    done
    echo "== $target: tests on $emulator"
    cargo test --release "${alike[@]}" "${checked[@]}" --no-default-features --target "$target" "${tests[@]}" 2>&1 | tee "$log"
    if [ "$target" = aarch64-unknown-linux-gnu ]; then
        echo "== $target: numbers on a CPU of the base architecture, without FEAT_FP16 and dot products"
        QEMU_CPU=cortex-a53 cargo test --release "${alike[@]}" "${checked[@]}" --no-default-features --target "$target" \
            --test parity -- numbers::depthwise numbers::f16 2>&1 | tee -a "$log"
    fi
    passed=$(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$log")
    [ "$passed" -gt 0 ] || die "$target: no test ran"
    echo "== $target: libfarface.a and libfarface.so built, $passed tests passed in $((SECONDS - start)) s"
}

mkdir -p "$cache"
install_tools
install_rust

unset CARGO_ENCODED_RUSTFLAGS CARGO_BUILD_TARGET
export RUSTC=$toolchain/rustc CARGO_TARGET_DIR=$cache/build
export RUSTFLAGS="--cfg emulated" # leaves out heavy test dependencies, see Cargo.toml
# Library and tests without link-time optimisation, so that what they depend on is built once for both. The library has
# none anyway: cargo does without where one of the crate types is for Rust programs.
alike=(--config 'profile.release.lto="off"')
# With all checks, since a usize of 32 bits must not overflow: the library too, which the tests then link.
checked=()
for option in overflow-checks debug-assertions; do
    checked+=(--config "profile.release.package.farface.$option=true")
done
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu"
export CARGO_TARGET_ARMV7_UNKNOWN_LINUX_GNUEABIHF_LINKER=arm-linux-gnueabihf-gcc
export CARGO_TARGET_ARMV7_UNKNOWN_LINUX_GNUEABIHF_RUNNER="qemu-arm-static -L /usr/arm-linux-gnueabihf"

"$RUSTC" --version
# One target's tests run while the other is built; each is told of as a whole.
targets=(aarch64-unknown-linux-gnu:qemu-aarch64-static armv7-unknown-linux-gnueabihf:qemu-arm-static)
jobs=()
for each in "${targets[@]}"; do
    check_target "${each%:*}" "${each#*:}" >"$cache/${each%:*}.out" 2>&1 &
    jobs+=($!)
done
failed=0
for i in "${!targets[@]}"; do
    wait "${jobs[$i]}" || failed=1
    cat "$cache/${targets[$i]%:*}.out"
done
exit "$failed"
