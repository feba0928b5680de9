//! The device of the guide: it is what the guide says, keeps every rule, and a guest on it survives its death and moves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vhost_migrate::frontend::{UserDevice, UserOptions};
use vhost_migrate::guest::{Guest, GuestConfig};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(120);
const EXAMPLE: &str = include_str!("../examples/file_disk.rs");
const GUIDE: &str = include_str!("../docs/guide/write-a-device.md");

/// The example as a program, which `cargo test` builds beside the tests.
fn program() -> PathBuf {
    let here = std::env::current_exe().unwrap();
    let path = here.parent().unwrap().parent().unwrap().join("examples/file_disk");
    assert!(path.exists(), "build it first: cargo build --example file_disk");
    path
}

/// Ends with the test.
struct Backend(Child);

impl Backend {
    fn start(folder: &Path) -> Backend {
        let mut command = Command::new(program());
        command.arg(folder.join("socket")).arg(folder.join("image")).stdin(Stdio::null());
        Backend(command.spawn().unwrap())
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
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
    let restart = format!("{} socket image", program().display());
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
        let mut backend = Backend::start(folder.path());
        let options = UserOptions::default();
        let device = UserDevice::connect(folder.path().join("socket"), options, Instant::now() + PATIENCE).unwrap();
        let mut guest =
            Guest::new(GuestConfig { packed, queues: 1, disk_area: 4 * MIB, ..GuestConfig::new(32 * MIB) }).unwrap();
        guest.boot(vec![Box::new(device)]).unwrap();
        guest.resume().unwrap();
        for _ in 0..5 {
            let (before, start) = (guest.stats().completions, Instant::now());
            while guest.stats().completions < before + 50 {
                assert!(guest.failure().is_none(), "{}", guest.failure().unwrap());
                assert!(start.elapsed() < PATIENCE, "the guest does nothing");
                std::thread::sleep(Duration::from_millis(1));
            }
            drop(backend);
            backend = Backend::start(folder.path());
        }
        guest.verify().unwrap();
        let stats = guest.stats();
        assert_eq!((stats.lost, stats.duplicates), (0, 0));
        assert!(stats.reconnects >= 4, "{}", stats.reconnects);
    }
}
