//! The command and other programs as child processes.
#![allow(dead_code, unused_imports)] // not every test binary uses all of it

use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};

pub(crate) use crate::wait::{PATIENCE, wait_for, wait_until};

/// Returns the command without arguments. It ends with the test.
pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-migrate"));
    command.arg("--exit-with-parent").env("RUST_LOG", "warn").stdin(Stdio::null());
    command
}

/// Runs the command to its end.
pub(crate) fn run(arguments: &[&str]) -> Output {
    program().args(arguments).output().unwrap()
}

/// Returns the path of `examples/file_disk.rs` as a program, which `cargo test` builds beside the tests.
pub(crate) fn file_disk() -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let path = here.parent().unwrap().parent().unwrap().join("examples/file_disk");
    assert!(path.exists(), "build it first: cargo build --example file_disk");
    path
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A child process, killed on drop.
pub(crate) struct ChildProcess(pub(crate) Child);

impl Drop for ChildProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
