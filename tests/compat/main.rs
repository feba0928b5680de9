//! Compatibility: what version 0.1 has written is read by every later version.
//!
//! `files` holds streams, states and inflight regions as they were written then. They are never replaced; a change of
//! a format adds files under new names. `cargo test --test compat -- --ignored` writes what is missing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod inflight;
mod state;
mod stream;

use std::path::{Path, PathBuf};

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat/files").join(name)
}

/// Returns the contents of a file.
fn read(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap_or_else(|error| panic!("tests/compat/files/{name}: {error}"))
}

/// Writes a file, unless it exists.
fn write(name: &str, contents: &[u8]) {
    if !path(name).exists() {
        std::fs::write(path(name), contents).unwrap();
    }
}
