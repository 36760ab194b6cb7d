# What the checks of the C interface share; not a check by itself.

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# need COMMAND PACKAGE: installs the package where the command is missing.
need() {
    command -v "$1" > /dev/null && return
    echo "installing $2"
    { apt-get update -qq || true; apt-get install -y -qq -o DPkg::Lock::Timeout=600 "$2"; } > "$work/apt.log" 2>&1 ||
        { cat "$work/apt.log"; exit 1; }
}

# Writes model.safetensors and picture.ppm into $work.
inputs() {
    FARFACE_TEST_OUT=$work cargo test --quiet --test capi_c inputs_for_scripts > "$work/inputs.log" 2>&1 ||
        { cat "$work/inputs.log"; exit 1; }
    ls "$work/model.safetensors" "$work/picture.ppm" > /dev/null
}
