//! farface command line.
fn main() {}
