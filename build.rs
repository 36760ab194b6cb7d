//! Names the shared library: its soname (install name on Apple systems) carries the ABI version.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let target = |key: &str| std::env::var(format!("CARGO_CFG_TARGET_{key}")).unwrap_or_default();
    let (os, vendor, env) = (target("OS"), target("VENDOR"), target("ENV"));
    if vendor == "apple" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-install_name,@rpath/libfarface.0.dylib");
    } else if os != "windows" && os != "none" && !target("FAMILY").contains("wasm") && env != "msvc" {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libfarface.so.0");
    }
}
