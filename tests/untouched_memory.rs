//! Migration, save and verification allocate no untouched guest memory on either side.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // also in the helpers of these tests

#[path = "kit/process.rs"]
mod process;
#[path = "kit/wait.rs"]
mod wait;

use std::path::{Path, PathBuf};

use serde_json::Value;
use vhost_migrate::control;
use vhost_migrate::guest::OwnerState;

use process::{ChildProcess, program, wait_for};

const MIB: u64 = 1 << 20;
/// Size of the guest's memory, of which half is used.
const MEMORY: u64 = 256 * MIB;
const USED: u64 = 128 * MIB;
/// Allowance for rings, buffers, inflight regions and dirty logs.
const OVERHEAD: u64 = 16 * MIB;

/// Returns the shared memory in the process's page tables, bytes.
fn shared_memory(process: &ChildProcess) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.0.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

fn assert_only_used_memory_is_allocated(process: &ChildProcess, when: &str) {
    let held = shared_memory(process);
    assert!((USED - OVERHEAD..USED + OVERHEAD).contains(&held), "{} MiB {when}", held / MIB);
}

struct Host {
    folder: tempfile::TempDir,
    backends: Vec<ChildProcess>,
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

    fn guest(&mut self, name: &str, more: &[&str]) -> (ChildProcess, PathBuf) {
        let (socket, control) = (self.path(&format!("{name}.vhost")), self.path(&format!("{name}.control")));
        let mut backend = program();
        backend.args(["backend", "blk", "--queues", "2", "--image"]).arg(self.path("disk"));
        self.backends.push(ChildProcess(backend.arg("--socket").arg(&socket).spawn().unwrap()));
        let mut guest = program();
        guest.args(["guest", "--backend"]).arg(socket).arg("--control").arg(&control).args(more);
        (ChildProcess(guest.spawn().unwrap()), control)
    }
}

fn send_command(control: &Path, command: Value, mut each: impl FnMut(Value)) -> std::io::Result<()> {
    let each = |event| each(serde_json::to_value(event).unwrap());
    control::call(control, &serde_json::from_value(command).unwrap(), each)
}

fn wait_until_running(control: &Path) {
    wait_for("a guest runs", || (control::status(control).ok()?.state == OwnerState::Running).then_some(()));
}

fn migrate(control: &Path, uri: &str, more: Value, each: impl FnMut(Value)) {
    let mut command = serde_json::json!({
        "command": "migrate", "uri": uri, "codec": "none", "channels": 2, "downtime_ms": 1000, "bandwidth": null,
        "max_rounds": 100,
    });
    command.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    send_command(control, command, each).unwrap();
}

fn verify(control: &Path) {
    send_command(control, serde_json::json!({"command": "verify"}), |_| ()).unwrap();
}

#[test]
fn a_migration_allocates_no_untouched_memory_on_either_side() {
    let mut host = Host::new();
    let memory = format!("{}MiB", MEMORY / MIB);
    let small = ["--memory", &memory, "--dirty-rate", "8MiB/s", "--request-rate", "50"];
    let (source, from) = host.guest("source", &small);
    wait_until_running(&from);
    assert_only_used_memory_is_allocated(&source, "at the source before");
    verify(&from);
    assert_only_used_memory_is_allocated(&source, "at the source after its verification");
    let uri = format!("unix:{}", host.path("incoming").display());
    let (destination, to) = host.guest("destination", &["--incoming", &uri]);
    wait_for("the destination listens", || host.path("incoming").exists().then_some(()));
    let mut looks = 0;
    migrate(&from, &uri, serde_json::json!({}), |event| {
        let during = event["event"] == "round" || event["event"] == "switchover";
        if during {
            looks += 1;
            assert_only_used_memory_is_allocated(&source, "at the source meanwhile");
            let held = shared_memory(&destination);
            assert!(held < USED + OVERHEAD, "{} MiB at the destination meanwhile", held / MIB);
        }
    });
    assert!(looks >= 2, "nobody looked");
    wait_until_running(&to);
    assert_only_used_memory_is_allocated(&destination, "at the destination");
    verify(&to);
    assert_only_used_memory_is_allocated(&destination, "at the destination after its verification");
}

#[test]
fn save_and_restore_allocate_no_untouched_memory() {
    let mut host = Host::new();
    let memory = format!("{}MiB", MEMORY / MIB);
    let (source, from) = host.guest("source", &["--memory", &memory, "--dirty-rate", "8MiB/s", "--request-rate", "50"]);
    wait_until_running(&from);
    let uri = format!("file:{}", host.path("saved").display());
    migrate(&from, &uri, serde_json::json!({}), |event| {
        if event["event"] == "switchover" {
            assert_only_used_memory_is_allocated(&source, "at the source meanwhile");
        }
    });
    let saved = std::fs::metadata(host.path("saved")).unwrap().len();
    assert!(saved < USED + 2 * OVERHEAD, "the file has {} MiB", saved / MIB);
    let (destination, to) = host.guest("destination", &["--incoming", &uri]);
    wait_until_running(&to);
    assert_only_used_memory_is_allocated(&destination, "at the destination");
}
