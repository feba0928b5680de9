//! The device of the guide. Its source is the guide's text. It passes every check, and a guest that uses it survives a
//! kill of the device and a migration.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

#[path = "kit/guest_work.rs"]
mod guest_work;
#[path = "kit/process.rs"]
mod process;
#[path = "kit/wait.rs"]
mod wait;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use vhost_migrate::frontend::{UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig};

use guest_work::run_for;
use process::{ChildProcess, PATIENCE, file_disk};

const MIB: u64 = 1 << 20;
const EXAMPLE: &str = include_str!("../examples/file_disk.rs");
const GUIDE: &str = include_str!("../docs/guide/write-a-device.md");

fn start(folder: &Path) -> ChildProcess {
    let mut command = Command::new(file_disk());
    command.arg(folder.join("socket")).arg(folder.join("image")).stdin(Stdio::null());
    ChildProcess(command.spawn().unwrap())
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::File::create(folder.path().join("image")).unwrap().set_len(16 * MIB).unwrap();
    folder
}

#[test]
fn the_guide_shows_the_example_and_it_has_less_than_60_lines() {
    let block = GUIDE.split("```rust\n").nth(1).unwrap().split("```").next().unwrap();
    assert_eq!(block, EXAMPLE);
    let lines = EXAMPLE.lines().count();
    assert!(lines < 60, "{lines} lines");
}

#[test]
fn the_example_passes_every_check() {
    let folder = folder();
    let restart = format!("{} socket image", file_disk().display());
    let mut check = Command::new(env!("CARGO_BIN_EXE_vhost-migrate"));
    check.args(["--exit-with-parent", "check", "socket", "--hostile", "--write", "--json", "--restart"]).arg(restart);
    let output = check.current_dir(folder.path()).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let found: serde_json::Value = serde_json::from_str(&text).unwrap();
    let rules = found["rules"].as_object().unwrap();
    let of =
        |verdict: &str| rules.iter().filter(|(_, v)| *v == verdict).map(|(rule, _)| rule.as_str()).collect::<Vec<_>>();
    assert!(of("pass").len() >= 30, "{text}");
    assert_eq!(of("fail"), Vec::<&str>::new(), "{text}");
    assert_eq!(of("warning"), Vec::<&str>::new(), "{text}");
}

#[test]
fn a_guest_survives_kills_of_the_example_with_split_and_packed_rings() {
    for packed in [false, true] {
        let folder = folder();
        let mut backend = start(folder.path());
        let options = UserOptions::default();
        let device = UserDevice::connect(folder.path().join("socket"), options, Instant::now() + PATIENCE).unwrap();
        let mut guest =
            Guest::new(GuestConfig::new(32 * MIB).with_packed(packed).with_queues(1).with_disk_area(4 * MIB)).unwrap();
        guest.boot(vec![Box::new(device)]).unwrap();
        guest.resume().unwrap();
        for _ in 0..5 {
            run_for(&guest, 50);
            drop(backend);
            backend = start(folder.path());
        }
        guest.verify().unwrap();
        let stats = guest.stats();
        assert_eq!((stats.lost, stats.duplicates), (0, 0));
        assert!(stats.reconnects >= 4, "{}", stats.reconnects);
    }
}
