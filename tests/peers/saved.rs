//! The system calls of a save, traced with strace: the writes are synced to disk in the right order.

use std::process::Command;

use vhost_migrate::stream::{StreamOptions, Uri, connect};

/// The environment variable with the URI to save to. It is set in the process that strace traces.
const TRACED: &str = "VHOST_MIGRATE_TEST_TRACED";

#[test]
fn a_save_is_on_disk_before_it_has_its_name_and_so_is_its_name() {
    if let Ok(to) = std::env::var(TRACED) {
        let to: Uri = to.parse().unwrap();
        return connect(&to, &StreamOptions::new().unwrap()).unwrap().finish().unwrap();
    }
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let place = folder.path().canonicalize().unwrap();
    let output = Command::new("strace")
        .args(["-f", "-y", "-e", "trace=pwrite64,fdatasync,fsync,renameat2"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "saved::a_save_is_on_disk_before_it_has_its_name_and_so_is_its_name"])
        .env(TRACED, format!("file:{}/saved", place.display()))
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words}");
    let place = place.display().to_string();
    let mut calls = words.lines().filter(|line| line.contains(&place));
    let folder_synced = format!("<{place}>)");
    // The order is: the unfinished header, the frames, the header, the name.
    for (call, of) in [
        ("pwrite64(", place.as_str()),
        ("fdatasync(", &place),
        ("pwrite64(", &place),
        ("fdatasync(", &place),
        ("renameat2(", "/saved\""),
        ("fsync(", &folder_synced),
    ] {
        let found = calls.next().unwrap_or_default();
        assert!(found.contains(call) && found.contains(of), "{found} instead of {call} of {of}:\n{words}");
    }
}
