//! Where the fixtures are. By itself, so that tests without other helpers' dependencies can use it.

use std::io::Write as _;
use std::path::PathBuf;

/// The folder with fixtures beside the project, or None (said on standard error) where it is not there.
pub fn shared() -> Option<PathBuf> {
    let path = std::env::var_os("FARFACE_SHARED")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")), PathBuf::from);
    if path.is_dir() {
        return Some(path);
    }
    assert!(
        std::env::var_os("FARFACE_SHARED").is_none(),
        "FARFACE_SHARED is not a folder: {}",
        path.display()
    );
    // Not by eprintln, which the test runner keeps to itself where a test passes.
    let _ = writeln!(std::io::stderr(), "skipped: ../shared not found");
    None
}
