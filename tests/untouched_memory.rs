//! Guest memory that was never used takes no memory, on either side, because its guest is migrated, saved or verified.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // also in the helpers of these tests

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use vhost_migrate::control;

const PATIENCE: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
/// Of the guest's memory; half of it is used, by CPUs, rings and what is written once.
const MEMORY: u64 = 256 * MIB;
const USED: u64 = 128 * MIB;
/// Room for rings, buffers, inflight regions and dirty logs.
const BESIDE: u64 = 16 * MIB;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-migrate"));
    command.arg("--exit-with-parent").env("RUST_LOG", "warn").stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// Killed when dropped.
struct Running(Child);

impl Running {
    /// Shared memory that the process has in its page tables, bytes.
    fn shared_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
    }

    fn assert_holds_what_is_used(&self, when: &str) {
        let held = self.shared_memory();
        assert!((USED - BESIDE..USED + BESIDE).contains(&held), "{} MiB {when}", held / MIB);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Host {
    folder: tempfile::TempDir,
    backends: Vec<Running>,
}

impl Host {
    fn new() -> Host {
        let folder = tempfile::tempdir().unwrap();
        std::fs::File::create(folder.path().join("disk")).unwrap().set_len(16 * MIB).unwrap();
        Host { folder, backends: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn guest(&mut self, name: &str, more: &[&str]) -> (Running, PathBuf) {
        let (socket, control) = (self.path(&format!("{name}.vhost")), self.path(&format!("{name}.control")));
        let mut backend = program();
        backend.args(["backend", "blk", "--queues", "2", "--image"]).arg(self.path("disk"));
        self.backends.push(Running(backend.arg("--socket").arg(&socket).spawn().unwrap()));
        let mut guest = program();
        guest.args(["guest", "--backend"]).arg(socket).arg("--control").arg(&control).args(more);
        (Running(guest.spawn().unwrap()), control)
    }
}

fn ask(control: &Path, command: Value, each: impl FnMut(Value)) -> std::io::Result<()> {
    control::call(control, &serde_json::from_value(command).unwrap(), each)
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn until_running(control: &Path) {
    until("a guest runs", || {
        let mut runs = false;
        let asked =
            ask(control, serde_json::json!({"command": "status"}), |status| runs = status["state"] == "running");
        asked.is_ok() && runs
    });
}

fn migrate(control: &Path, uri: &str, more: Value, each: impl FnMut(Value)) {
    let mut command = serde_json::json!({
        "command": "migrate", "uri": uri, "codec": "none", "channels": 2, "downtime_ms": 1000, "bandwidth": null,
        "max_rounds": 100,
    });
    command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    ask(control, command, each).unwrap();
}

fn verify(control: &Path) {
    ask(control, serde_json::json!({"command": "verify"}), |_| ()).unwrap();
}

#[test]
fn neither_side_of_a_migration_takes_memory_that_the_guest_never_used() {
    let mut host = Host::new();
    let memory = format!("{}MiB", MEMORY / MIB);
    let small = ["--memory", &memory, "--dirty-rate", "8MiB/s", "--request-rate", "50"];
    let (source, from) = host.guest("source", &small);
    until_running(&from);
    source.assert_holds_what_is_used("at the source before");
    verify(&from);
    source.assert_holds_what_is_used("at the source after its verification");
    let uri = format!("unix:{}", host.path("incoming").display());
    let (destination, to) = host.guest("destination", &["--incoming", &uri]);
    until("the destination listens", || host.path("incoming").exists());
    let mut looks = 0;
    migrate(&from, &uri, serde_json::json!({}), |event| {
        let during = event["event"] == "round" || event["event"] == "switchover";
        if during {
            looks += 1;
            source.assert_holds_what_is_used("at the source meanwhile");
            let held = destination.shared_memory();
            assert!(held < USED + BESIDE, "{} MiB at the destination meanwhile", held / MIB);
        }
    });
    assert!(looks >= 2, "nobody looked");
    until_running(&to);
    destination.assert_holds_what_is_used("at the destination");
    verify(&to);
    destination.assert_holds_what_is_used("at the destination after its verification");
}

#[test]
fn a_guest_that_is_saved_and_restored_takes_no_more_memory_than_before() {
    let mut host = Host::new();
    let memory = format!("{}MiB", MEMORY / MIB);
    let (source, from) = host.guest("source", &["--memory", &memory, "--dirty-rate", "8MiB/s", "--request-rate", "50"]);
    until_running(&from);
    let uri = format!("file:{}", host.path("saved").display());
    migrate(&from, &uri, serde_json::json!({}), |event| {
        if event["event"] == "switchover" {
            source.assert_holds_what_is_used("at the source meanwhile");
        }
    });
    let saved = std::fs::metadata(host.path("saved")).unwrap().len();
    assert!(saved < USED + 2 * BESIDE, "the file has {} MiB", saved / MIB);
    let (destination, to) = host.guest("destination", &["--incoming", &uri]);
    until_running(&to);
    destination.assert_holds_what_is_used("at the destination");
}
