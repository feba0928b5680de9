//! Tests of the command with real processes, sockets and files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // also in the helpers of these tests

mod disks;
mod flood;
#[path = "../kit/message.rs"]
mod message;
#[path = "../kit/metrics.rs"]
mod metrics;
mod outcome;
#[path = "../kit/process.rs"]
mod process;
#[path = "../kit/relay.rs"]
#[allow(dead_code)] // these tests use only some of its faults
mod relay;
mod saves;
mod signals;
#[path = "../kit/wait.rs"]
mod wait;
mod waits;
mod words;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use serde_json::{Value, json};

use metrics::{counter_value, fetch_metrics};
use process::{ChildProcess, PATIENCE, file_disk, program, run, text, wait_for, wait_until};

/// Serializes the tests, which start many busy processes.
fn serial_guard() -> MutexGuard<'static, ()> {
    static SERIAL: Mutex<()> = Mutex::new(());
    SERIAL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder with a disk, back-ends and small guests.
struct Host {
    folder: tempfile::TempDir,
    running: Vec<ChildProcess>,
    _serial: MutexGuard<'static, ()>,
}

impl Host {
    fn new() -> Host {
        let folder = tempfile::tempdir().unwrap();
        std::fs::File::create(folder.path().join("disk")).unwrap().set_len(16 << 20).unwrap();
        Host { folder, running: Vec::new(), _serial: serial_guard() }
    }

    /// A host with a running guest. Returns the guest's control socket too.
    fn with_source() -> (Host, PathBuf) {
        let mut host = Host::new();
        let source = host.source();
        (host, source)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn backend(&mut self, name: &str) -> PathBuf {
        self.backend_with(name, &[])
    }

    fn backend_with(&mut self, name: &str, more: &[&str]) -> PathBuf {
        let disk = self.path("disk");
        self.backend_on(&disk, name, more)
    }

    /// Starts a back-end on another disk.
    fn backend_on(&mut self, image: &Path, name: &str, more: &[&str]) -> PathBuf {
        let socket = self.path(name);
        let mut command = program();
        command.args(["backend", "blk", "--queues", "4", "--image"]).arg(image).arg("--socket").arg(&socket).args(more);
        self.start(&mut command);
        socket
    }

    /// Starts a process that ends with the test.
    fn start(&mut self, command: &mut Command) {
        self.running.push(ChildProcess(command.stdout(Stdio::null()).spawn().unwrap()));
    }

    /// Starts a guest with its own back-end. Returns its control socket.
    fn guest(&mut self, name: &str, more: &[&str]) -> PathBuf {
        let backend = self.backend(&format!("{name}.vhost"));
        self.guest_on(&backend, name, more)
    }

    fn guest_on(&mut self, backend: &Path, name: &str, more: &[&str]) -> PathBuf {
        let control = self.path(&format!("{name}.control"));
        let mut command = program();
        command.args(["guest", "--backend"]).arg(backend).arg("--control").arg(&control).args(more);
        self.start(&mut command);
        control
    }

    /// Starts the device of the guide on the common disk. Returns its socket.
    fn file_disk(&mut self, name: &str) -> PathBuf {
        let socket = self.path(name);
        let mut command = Command::new(file_disk());
        self.running.push(ChildProcess(command.arg(&socket).arg(self.path("disk")).spawn().unwrap()));
        socket
    }

    fn source(&mut self) -> PathBuf {
        self.source_with(&[])
    }

    fn source_with(&mut self, more: &[&str]) -> PathBuf {
        let small = ["--memory", "64MiB", "--dirty-rate", "8MiB/s", "--request-rate", "50"];
        let control = self.guest("source", &[&small, more].concat());
        wait_for_state(&control, "running");
        control
    }

    fn destination(&mut self, name: &str, uri: &str) -> PathBuf {
        self.guest(name, &["--incoming", uri])
    }

    /// The URI of a socket.
    fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.path(name).display())
    }

    /// Starts a destination that waits for a guest at this URI.
    fn waiting(&mut self, name: &str, uri: &str) -> PathBuf {
        let destination = self.destination(name, uri);
        wait_for_state(&destination, "absent");
        destination
    }

    /// Starts a guest, and a destination that waits for it, each with its own back-end. Returns both control sockets
    /// and the URI.
    fn pair(&mut self) -> (PathBuf, PathBuf, String) {
        let source = self.source();
        let unix = self.unix("incoming");
        let destination = self.waiting("destination", &unix);
        (source, destination, unix)
    }
}

/// Sends a control command. Returns its events, including the last.
fn send_command(control: &Path, command: &Value) -> Option<Vec<Value>> {
    let stream = UnixStream::connect(control).ok()?;
    (&stream).write_all(format!("{command}\n").as_bytes()).ok()?;
    let mut events = Vec::new();
    for line in BufReader::new(stream).lines() {
        let event: Value = serde_json::from_str(&line.ok()?).unwrap();
        let last = event["event"] == "ok" || event["event"] == "error";
        events.push(event);
        if last {
            return Some(events);
        }
    }
    None
}

fn status(control: &Path) -> Option<Value> {
    send_command(control, &json!({"command": "status"}))?.into_iter().next()
}

fn wait_for_state(control: &Path, state: &str) -> Value {
    wait_for(state, || status(control).filter(|status| status["state"] == state))
}

/// Waits until a destination listens for a migration, which `cancel` reports. This is later than its control socket.
fn wait_until_listening(control: &Path) -> String {
    wait_for("it waits for a migration", || {
        let answer = send_command(control, &json!({"command": "cancel"})).unwrap().pop().unwrap();
        let message = answer["message"].as_str().unwrap_or_default();
        message.contains("no migration has started yet").then(|| message.to_owned())
    })
}

/// Asserts that the guest makes progress and that every byte is right.
fn verify(control: &Path) {
    let before = wait_for_state(control, "running");
    wait_for("the guest makes progress", || {
        (status(control).unwrap()["requests"].as_u64() > before["requests"].as_u64()).then_some(())
    });
    let answer = send_command(control, &json!({"command": "verify"})).unwrap();
    assert_eq!(answer.last().unwrap()["event"], "ok", "{answer:?}");
    let status = &answer[0];
    assert!(status["verified_memory_bytes"].as_u64().unwrap() > 16 << 20, "{status}");
    assert_eq!((status["lost"].as_u64(), status["duplicates"].as_u64()), (Some(0), Some(0)), "{status}");
}

fn migrate(control: &Path, uri: &str, more: &[&str]) -> Output {
    // A downtime limit that a busy machine meets: its length is not tested here.
    let usual = ["migrate", "--control", control.to_str().unwrap(), uri, "--json", "--downtime", "3000"];
    run(&[&usual[..], more].concat())
}

/// Starts a migration with so little bandwidth that it does not end by itself.
fn slow_migration(control: &Path, uri: &str) -> (ChildProcess, impl Iterator + use<>) {
    let mut slow = program();
    slow.args(["migrate", "--json", "--bandwidth", "1MiB/s", uri, "--control"]).arg(control);
    let mut slow = ChildProcess(slow.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(slow.0.stdout.take().unwrap()).lines();
    assert!(lines.next().unwrap().unwrap().contains("started"));
    (slow, lines)
}

/// Waits until the migration has failed. Returns the error.
fn expect_failure(migration: &mut ChildProcess) -> String {
    assert_eq!(migration.0.wait().unwrap().code(), Some(1));
    let mut why = String::new();
    migration.0.stderr.take().unwrap().read_to_string(&mut why).unwrap();
    why
}

fn events(output: &Output) -> Vec<Value> {
    text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn assert_completed(output: &Output) {
    let last = events(output).pop();
    let completed = last.is_some_and(|event| event["event"] == "completed");
    assert!(output.status.success() && completed, "{}\n{}", text(&output.stdout), text(&output.stderr));
}

#[rstest]
fn demo_verifies_every_byte_and_reports_all_figures(#[values(&[][..], &["--packed"])] rings: &[&str]) {
    let _serial = serial_guard();
    let arguments =
        ["demo", "--memory", "64MiB", "--disk", "16MiB", "--seconds", "1", "--dirty-rate", "20MiB/s", "--json"];
    let output = run(&[&arguments[..], rings].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let done = events(&output).pop().unwrap();
    assert_eq!((&done["event"], &done["verified"], &done["lost"]), (&json!("done"), &json!(true), &json!(0)), "{done}");
    assert_eq!(done["guest_bytes"], 64 << 20);
    let figures = ["total_ms", "downtime_ms", "observed_downtime_ms", "rounds", "wire_bytes", "pages_sent", "requests"];
    for figure in figures.into_iter().chain(["zero_pages", "dirty_rate_bytes_per_s"]) {
        assert!(done[figure].as_f64().is_some_and(|value| value > 0.0), "{figure}: {done}");
    }
    assert!(done["resubmitted"].is_u64());
    assert_eq!(done["log_quality"], "exact");
}

#[test]
fn demo_survives_back_ends_killed_before_during_and_after_the_migration() {
    let _serial = serial_guard();
    for rings in [&[][..], &["--packed"]] {
        let arguments = [
            "demo",
            "--kill",
            "--memory",
            "64MiB",
            "--disk",
            "16MiB",
            "--seconds",
            "2",
            "--json",
            "--downtime",
            "3000",
        ];
        let output = run(&[&arguments[..], &["--dirty-rate", "20MiB/s", "--codec", "zstd:1"], rings].concat());
        assert!(output.status.success(), "{}", text(&output.stderr));
        let done = events(&output).pop().unwrap();
        assert_eq!((&done["verified"], &done["lost"], &done["kills"]), (&json!(true), &json!(0), &json!(3)), "{done}");
    }
}

#[rstest]
#[case::split(&[])]
#[case::packed(&["--packed", "--queues", "4"])]
fn a_guest_migrates_over_unix_tcp_and_a_file(#[case] rings: &[&str]) {
    let mut host = Host::new();
    let source = host.source_with(rings);
    let unix = host.unix("incoming");
    let second = host.waiting("second", &unix);
    assert_completed(&migrate(&source, &unix, &["--codec", "zstd:1", "--channels", "3"]));
    assert_eq!(status(&source).unwrap()["state"], "migrated");
    verify(&second);

    // Probably a free port.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let tcp = format!("tcp:127.0.0.1:{port}");
    let third = host.waiting("third", &tcp);
    assert_completed(&migrate(&second, &tcp, &[]));
    verify(&third);

    let saved = host.path("guest.vhm");
    let file = format!("file:{}", saved.display());
    assert_completed(&migrate(&third, &file, &["--codec", "zstd:1"]));
    let inspected = run(&["inspect", "--json", "stream", saved.to_str().unwrap()]);
    let found: Value = serde_json::from_slice(&inspected.stdout).unwrap();
    assert_eq!(found["committed"], true, "{found}");
    let fourth = host.destination("fourth", &file);
    verify(&fourth);

    // A pipe through a command: the other end is a guest that reads its standard input.
    let mut bytes = std::fs::read(&saved).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let damaged = host.path("damaged.vhm");
    std::fs::write(&damaged, bytes).unwrap();
    let inspected = run(&["inspect", "stream", damaged.to_str().unwrap()]);
    assert!(!inspected.status.success() && text(&inspected.stderr).contains("checksum"), "{}", text(&inspected.stderr));
}

/// Migrates a guest with the options `more` from one back-end to another.
fn assert_migrates_between(mut host: Host, [here, there]: [PathBuf; 2], more: &[&str]) {
    let unix = host.unix("incoming");
    let source = host.guest_on(&here, "source", &[&["--memory", "64MiB"], more].concat());
    let destination = host.guest_on(&there, "destination", &["--incoming", &unix]);
    wait_for_state(&source, "running");
    wait_for_state(&destination, "absent");
    assert_completed(&migrate(&source, &unix, &[]));
    verify(&destination);
}

#[test]
fn a_guest_migrates_between_two_devices_of_the_guide() {
    let mut host = Host::new();
    let disks = ["here", "there"].map(|name| host.file_disk(name));
    assert_migrates_between(host, disks, &["--queues", "1"]);
}

#[test]
fn a_guest_with_inflight_migration_does_not_wait_for_its_disk() {
    let mut host = Host::new();
    let disks = ["here", "there"].map(|name| host.backend_with(name, &["--inflight-migration"]));
    assert_migrates_between(host, disks, &["--inflight-migration"]);
}

#[test]
fn a_guest_overwrites_foreign_disk_contents_only_with_overwrite() {
    let mut host = Host::new();
    std::fs::write(host.path("disk"), vec![7; 16 << 20]).unwrap();
    let (backend, control) = (host.backend("vhost"), host.path("refused"));
    let arguments = ["guest", "--memory", "32MiB", "--backend", backend.to_str().unwrap(), "--control"];
    let refused = run(&[&arguments[..], &[control.to_str().unwrap()]].concat());
    assert_eq!(refused.status.code(), Some(1));
    assert!(text(&refused.stderr).contains("--overwrite"), "{}", text(&refused.stderr));
    assert!(std::fs::read(host.path("disk")).unwrap() == vec![7; 16 << 20]);
    let control = host.guest_on(&backend, "told", &["--memory", "32MiB", "--overwrite"]);
    wait_for_state(&control, "running");
    verify(&control);
}

#[test]
fn a_guest_migrates_over_a_bidirectional_command() {
    let (mut host, source) = Host::with_source();
    let incoming = host.path("incoming");
    let unix = format!("unix:{}", incoming.display());
    let destination = host.waiting("destination", &unix);
    // Like `ssh … socat`: relays bytes between its standard streams and a socket.
    let relay = "import os,socket,sys,threading
s=socket.socket(socket.AF_UNIX);s.connect(sys.argv[1])
def back():
    while True:
        b=s.recv(65536)
        if not b: break
        v=memoryview(b)
        while v: v=v[os.write(1,v):]
    os._exit(0)
threading.Thread(target=back,daemon=True).start()
while True:
    b=os.read(0,65536)
    if not b: break
    s.sendall(b)
s.shutdown(socket.SHUT_WR)
threading.Event().wait(60)";
    let script = host.path("relay.py");
    std::fs::write(&script, relay).unwrap();
    let exec = format!("exec:exec python3 {} {}", script.display(), incoming.display());
    assert_completed(&migrate(&source, &exec, &[]));
    verify(&destination);
}

#[test]
fn a_command_that_holds_the_migrated_guest_is_not_killed() {
    let (mut host, source) = Host::with_source();
    let (backend, control) = (host.backend("home.vhost"), host.path("home.control"));
    let program = env!("CARGO_BIN_EXE_vhost-migrate");
    let (backend, home) = (backend.display(), control.display());
    let exec = format!("exec:exec {program} guest --backend {backend} --control {home} --incoming fd:0 >&2");
    assert_completed(&migrate(&source, &exec, &[]));
    assert_eq!(send_command(&source, &json!({"command": "quit"})).unwrap()[0]["event"], "ok");
    verify(&control);
    assert_eq!(send_command(&control, &json!({"command": "quit"})).unwrap()[0]["event"], "ok");
}

#[test]
fn a_guest_runs_after_a_failed_migration_and_the_next_one_succeeds() {
    let (mut host, source) = Host::with_source();
    let nobody = host.unix("nobody");
    let output = migrate(&source, &nobody, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("still runs here"), "{}", text(&output.stderr));
    verify(&source);
    let wrong = migrate(&source, "smoke:signals", &[]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(text(&wrong.stderr).contains("tcp:HOST:PORT"), "{}", text(&wrong.stderr));

    let unix = host.unix("incoming");
    let destination = host.waiting("destination", &unix);
    // Ctrl-C during the migration, which has little bandwidth.
    let (mut slow, _events) = slow_migration(&source, &unix);
    signal(&slow, Signal::SIGINT);
    let why = expect_failure(&mut slow);
    assert!(why.contains("cancelled"), "{why}");
    verify(&source);

    assert_completed(&migrate(&source, &unix, &[]));
    verify(&destination);
}

#[test]
fn a_killed_destination_leaves_the_guest_at_its_source_for_another_destination() {
    let (mut host, source) = Host::with_source();
    let unix = host.unix("incoming");
    wait_for_state(&host.destination("killed", &unix), "absent");
    let (mut slow, _events) = slow_migration(&source, &unix);
    drop(host.running.pop()); // with SIGKILL
    let why = expect_failure(&mut slow);
    assert!(why.contains("still runs here"), "{why}");
    verify(&source);
    // At the stale socket of the killed destination.
    let next = host.waiting("next", &unix);
    assert_completed(&migrate(&source, &unix, &[]));
    verify(&next);
}

#[test]
fn dirty_rate_reports_cpus_and_disks_and_a_forecast() {
    let (_host, source) = Host::with_source();
    let output = run(&["dirty-rate", "--control", source.to_str().unwrap(), "--seconds", "1", "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let sources = found["rate"]["sources"].as_array().unwrap();
    assert_eq!(sources.len(), 2, "{found}");
    for source in sources {
        assert!(source["pages_per_s"].as_f64().unwrap() > 0.0, "{found}");
        assert_eq!(source["log_quality"], "exact", "{found}");
    }
    assert_eq!(found["rate"]["log_quality"], "exact", "{found}");
    assert!(found["rate"]["working_set_bytes"].as_u64().unwrap() >= 1 << 20, "{found}");
    assert!(found["forecast"]["rounds"].is_u64(), "{found}");
    // The measurement has stopped all tracking and left the guest unchanged.
    let again = run(&["dirty-rate", "--control", source.to_str().unwrap(), "--seconds", "0.2"]);
    assert!(again.status.success() && text(&again.stdout).contains("cpus"), "{}", text(&again.stderr));
    verify(&source);
}

/// Only a disk handles SIGHUP, by reading its image's size.
#[test]
fn guest_and_backend_net_ignore_sighup() {
    let (mut host, source) = Host::with_source();
    let (net, mut command) = (host.path("net"), program());
    command.args(["backend", "net", "--loopback", "--socket"]).arg(&net);
    host.start(&mut command);
    wait_until("the interface comes up", || UnixStream::connect(&net).is_ok());
    // The guest and the interface; the disk handles it.
    for process in &host.running {
        signal(process, Signal::SIGHUP);
    }
    verify(&source);
    UnixStream::connect(&net).unwrap();
    for process in &mut host.running {
        assert_eq!(process.0.try_wait().unwrap(), None);
    }
}

#[test]
fn back_end_and_front_end_serve_their_counters_to_prometheus() {
    let mut host = Host::new();
    let (metrics, socket) = (host.path("metrics"), host.path("counted.vhost"));
    let mut command = program();
    command.args(["backend", "blk", "--queues", "2", "--image"]).arg(host.path("disk"));
    command.arg("--metrics").arg(format!("unix:{}", metrics.display())).arg("--socket").arg(&socket);
    host.start(&mut command);
    let control = host.path("counted.control");
    let mut guest = program();
    guest.args(["guest", "--memory", "64MiB", "--backend"]).arg(&socket).arg("--control").arg(&control);
    let driven = host.path("driven");
    guest.arg("--metrics").arg(format!("unix:{}", driven.display()));
    host.start(&mut guest);
    verify(&control);
    let rate = run(&["dirty-rate", "--control", control.to_str().unwrap(), "--seconds", "0.3"]);
    assert!(rate.status.success(), "{}", text(&rate.stderr));
    assert_eq!(send_command(&control, &json!({"command": "pause"})).unwrap()[0]["event"], "ok");
    let completions = status(&control).unwrap()["completions"].as_u64().unwrap();
    let found = fetch_metrics(UnixStream::connect(&metrics).unwrap());
    let rings = [
        counter_value(&found, "vhost_requests_total", "ring=\"0\""),
        counter_value(&found, "vhost_requests_total", "ring=\"1\""),
    ];
    assert!(
        rings.iter().all(|count| *count > 0) && rings.iter().sum::<u64>() >= completions,
        "{rings:?}, {completions}: {found}"
    );
    for name in
        ["vhost_read_bytes_total", "vhost_written_bytes_total", "vhost_marked_pages_total", "vhost_notifications_total"]
    {
        assert!(counter_value(&found, name, "") > 0, "{name}: {found}");
    }
    assert_eq!(counter_value(&found, "vhost_connections_total", ""), 1, "{found}");
    assert_eq!(counter_value(&found, "vhost_messages_total", "request=\"SET_LOG_BASE\",result=\"done\""), 1, "{found}");
    assert_eq!(counter_value(&found, "vhost_messages_total", "result=\"refused\""), 0, "{found}");
    assert_eq!(
        counter_value(&found, "vhost_unlogged_pages_total", "") + counter_value(&found, "vhost_broken_rings_total", ""),
        0,
        "{found}"
    );
    let found = fetch_metrics(UnixStream::connect(&driven).unwrap());
    assert_eq!(counter_value(&found, "vhost_frontend_messages_total", "request=\"SET_LOG_BASE\""), 1, "{found}");
    assert!(counter_value(&found, "vhost_frontend_harvested_pages_total", "") > 0, "{found}");
    assert_eq!(counter_value(&found, "vhost_frontend_refused_total", ""), 0, "{found}");
    // Lost and restored connections.
    drop(host.running.remove(0));
    host.running.push(ChildProcess(command.spawn().unwrap()));
    assert_eq!(send_command(&control, &json!({"command": "resume"})).unwrap()[0]["event"], "ok");
    let reconnects = || {
        let found = fetch_metrics(UnixStream::connect(&driven).unwrap());
        counter_value(&found, "vhost_frontend_reconnects_total", "counted.vhost")
    };
    wait_until("the back-end is seen to be back", || reconnects() > 0);
    verify(&control);
    assert_eq!(reconnects(), 1);
}

#[test]
fn watch_reports_a_lost_and_a_restored_back_end() {
    let mut host = Host::new();
    let socket = host.backend("watched.vhost");
    let control = host.guest_on(&socket, "watched", &["--memory", "64MiB"]);
    wait_for_state(&control, "running");
    let (events, heard) = std::sync::mpsc::channel();
    let watched = control.clone();
    let watching = std::thread::spawn(move || {
        let command = vhost_migrate::control::ControlCommand::Watch { seconds: 3600.0 };
        let _ = vhost_migrate::control::call(&watched, &command, |event| {
            drop(events.send(serde_json::to_value(event).unwrap()))
        });
    });
    let next = || heard.recv_timeout(PATIENCE).unwrap();
    let first = next();
    assert_eq!((&first["event"], &first["away_ms"], &first["reconnects"]), (&json!("device"), &Value::Null, &json!(0)));
    drop(host.running.remove(0));
    let away = next();
    assert!(away["away_ms"].is_u64() && away["refused"].is_null(), "{away}");
    let device = |control| status(control).unwrap()["devices"][0].clone();
    assert!(device(&control)["away_ms"].is_u64());
    host.backend("watched.vhost");
    let back = next();
    assert_eq!((&back["away_ms"], &back["reconnects"]), (&Value::Null, &json!(1)), "{back}");
    assert!(device(&control)["away_ms"].is_null());
    verify(&control);
    let refused = send_command(&control, &json!({"command": "watch", "seconds": -1.0})).unwrap();
    assert!(refused[0]["message"].as_str().unwrap().contains("watch for 0 to 86400"), "{refused:?}");
    assert_eq!(send_command(&control, &json!({"command": "quit"})).unwrap()[0]["event"], "ok");
    watching.join().unwrap();
}

#[test]
fn a_paused_guest_makes_no_progress_and_quit_ends_its_process() {
    let (mut host, source) = Host::with_source();
    assert_eq!(send_command(&source, &json!({"command": "pause"})).unwrap()[0]["event"], "ok");
    let (first, second) = (status(&source).unwrap(), status(&source).unwrap());
    assert_eq!((&first["state"], &first["pages"]), (&json!("paused"), &second["pages"]));
    assert_eq!(send_command(&source, &json!({"command": "resume"})).unwrap()[0]["event"], "ok");
    verify(&source);
    assert_eq!(send_command(&source, &json!({"command": "quit"})).unwrap()[0]["event"], "ok");
    assert_eq!(host.running.last_mut().unwrap().0.wait().unwrap().code(), Some(0));
    assert!(!source.exists(), "its control socket is removed");
}

#[test]
fn wrong_arguments_exit_with_2_and_an_example() {
    for (arguments, hint) in [
        (&["demo", "--memory", "lots"][..], "1.5M or 1G"),
        (&["migrate", "unix:x"], "--control"),
        (&["guest", "--backend", "b", "--control", "c", "--incoming", "x"], "tcp:"),
        (&["backend", "blk", "--socket", "s"], "--image"),
        (&["inspect", "inflight", "f", "--used", "1"], "QUEUE:INDEX"),
        (&["backend", "blk", "--socket", "s", "--image", "i", "--iommu", "--postcopy"], "cannot be used with"),
        (&["backend", "net", "--socket", "s", "--loopback", "--front-ends", "2"], "start a back-end for each"),
        (&["fly"], "Usage"),
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).contains(hint), "{arguments:?}: {}", text(&output.stderr));
    }
}

/// Each value is the only error on its command line.
#[test]
fn an_impossible_value_is_refused_when_the_command_line_is_parsed() {
    let long = "x".repeat(108);
    let [guest, blk, net] = [
        &["guest", "--backend", "b", "--control", "/nonexistent/c"][..],
        &["backend", "blk", "--socket", "/nonexistent/s", "--image", "/nonexistent/i"],
        &["backend", "net", "--socket", "/nonexistent/s"],
    ];
    let [migrate, rate] =
        [&["migrate", "--control", "/nonexistent/c"][..], &["dirty-rate", "--control", "/nonexistent/c"]];
    let unix = format!("unix:{long}");
    for (command, more, hint) in [
        (migrate, &["smoke:signals"][..], "tcp:HOST:PORT"),
        (migrate, &["tcp:host"], "a port is missing"),
        (migrate, &["tcp:host:0"], "port 0"),
        (migrate, &["fd:-1"], "open file descriptor"),
        (migrate, &[&unix], "use a shorter one"),
        (migrate, &["unix:x", "--switchover-timeout", "0"], "within no time"),
        (migrate, &["unix:x", "--continue"], "file:PATH"),
        (guest, &["--queue-size", "100"], "a power of two from 8 to 32768"),
        (guest, &["--queue-size", "4"], "a power of two from 8 to 32768"),
        (guest, &["--queues", "257"], "1..=256"),
        (guest, &["--memory", "1000"], "whole pages of 4 KiB"),
        (guest, &["--memory", "1MiB"], "1 MiB of memory are too little"),
        (guest, &["--memory", "64MiB", "--working-set", "1G"], "too little"),
        (guest, &["--working-set", "0"], "at least one page of working set"),
        (guest, &["--switchover-timeout", "0", "--incoming", "unix:x"], "within no time"),
        (guest, &["--metrics", "tcp:host:high"], "HOST:PORT"),
        (guest, &["--backend", &long], "use a shorter one"),
        (blk, &["--queue-size", "100"], "a power of two from 2 to 32768"),
        (blk, &["--serial", "more than twenty bytes"], "at most 20 fit"),
        (blk, &["--metrics", "tcp:9100"], "HOST:PORT"),
        (net, &["--loopback", "--queue-size", "1000"], "a power of two from 2 to 32768"),
        (net, &["--loopback", "--mac", "01:00:00:00:00:00"], "first byte is even"),
        (net, &["--loopback", "--mac", "0:0:0:0:0:0"], "zeroes"),
        (net, &["--loopback", "--mac", "+2:54:00:12:34:56"], "52:54:00:12:34:56"),
        (net, &["--tap", "sixteen-bytes-xx"], "1 to 15 bytes"),
        (net, &["--pair", &long], "use a shorter one"),
        (&["backend", "net", "--loopback"], &["--socket", &long], "use a shorter one"),
        (&["backend", "net", "--loopback"], &["--fd=-1"], "-1 is not in 0.."),
        (rate, &["--seconds", "0"], "0.01 to 3600"),
        (rate, &["--seconds", "3601"], "0.01 to 3600"),
        (rate, &["--seconds", "nan"], "number of seconds"),
        (&["demo"], &["--memory", "1000"], "whole pages of 4 KiB"),
        (&["demo"], &["--disk", "1000"], "a disk has 1024 to"),
        (&["demo"], &["--switchover-timeout", "0.1"], "within no time"),
        (&["resume"], &["--control", &long], "use a shorter one"),
        (&["check"], &[&long], "use a shorter one"),
        (&["check", "/nonexistent/s"], &["--restart", ""], "a value is required"),
        (&["check", "/nonexistent/s"], &["--frame-source", "tcp:host"], "HOST:PORT"),
        (&["check", "/nonexistent/s"], &["--queue-size", "2048"], "a power of two from 64 to 1024"),
        (&["inspect", "log", "/nonexistent/f"], &["--memory", "0"], "a size of 0"),
        (&["inspect", "inflight", "/nonexistent/f"], &["--queue-size", "0"], "0 is not in 1..=32768"),
        (&["inspect", "inflight", "/nonexistent/f"], &["--used", "1:5"], "no queue 1"),
        (&["inspect", "inflight", "/nonexistent/f", "--packed"], &["--published", "1"], "no queue 1"),
    ] {
        let arguments = [command, more].concat();
        let output = run(&arguments);
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {told}");
        assert!(told.starts_with("error: ") && told.contains(hint), "{arguments:?}: {told}");
    }
}

#[test]
fn a_startup_failure_is_reported_in_one_line() {
    let host = Host::new();
    let disk = host.path("disk");
    let disk = disk.to_str().unwrap();
    for (arguments, hint) in [
        (&["backend", "blk", "--socket", "/tmp/s", "--image", "/nonexistent/image"][..], "/nonexistent/image"),
        (&["backend", "blk", "--socket", "/nonexistent/s", "--image", disk], "directory"),
        (&["backend", "blk", "--socket", disk, "--image", disk], "not a socket"),
        (&["dirty-rate", "--control", "/nonexistent/c"], "Is the guest's process running"),
        (&["inspect", "log", "/nonexistent/log"], "/nonexistent/log"),
        (&["inspect", "stream", disk], "not a migration stream"),
    ] {
        let output = run(arguments);
        let told = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {told}");
        assert!(told.contains(hint) && told.trim().lines().count() == 1, "{arguments:?}: {told}");
    }
}

#[test]
fn cancel_at_an_idle_destination_reports_that_no_migration_has_come() {
    let mut host = Host::new();
    let uri = host.unix("incoming");
    let waiting = host.waiting("waiting", &uri);
    let message = wait_until_listening(&waiting);
    assert!(message.contains("this process waits for one, and quit ends it"), "{message}");
}

#[test]
fn a_snapshot_runs_on_a_disk_copy_while_its_guest_goes_on() {
    let (mut host, source) = Host::with_source();
    assert_eq!(send_command(&source, &json!({"command": "pause"})).unwrap().last().unwrap()["event"], "ok");
    let folder = host.path("elsewhere");
    std::fs::create_dir(&folder).unwrap();
    let save = |more: &[&str]| {
        let mut command = program();
        command.args(["migrate", "--control", source.to_str().unwrap(), "file:saved.vhm"]).args(more);
        command.current_dir(&folder).output().unwrap()
    };
    let saved = save(&["--continue"]);
    assert!(saved.status.success(), "{}", text(&saved.stderr));
    assert!(!text(&saved.stderr).contains("moves the guest"), "{}", text(&saved.stderr));
    assert_eq!(status(&source).unwrap()["state"], "paused");
    let (disk, copy) = (host.path("disk"), host.path("copy"));
    assert!(Command::new("cp").arg("--preserve=xattr").args([disk, copy]).status().unwrap().success());
    assert_eq!(send_command(&source, &json!({"command": "resume"})).unwrap().last().unwrap()["event"], "ok");
    verify(&source);

    // A relative path refers to the caller's folder.
    let file = folder.join("saved.vhm");
    std::fs::rename(host.path("copy"), host.path("other-disk")).unwrap();
    let other = host.path("other-disk");
    let backend = host.backend_on(&other, "copy.vhost", &[]);
    let again = host.guest_on(&backend, "again", &["--incoming", &format!("file:{}", file.display())]);
    wait_for_state(&again, "paused");
    assert_eq!(send_command(&again, &json!({"command": "resume"})).unwrap().last().unwrap()["event"], "ok");
    verify(&again);

    let moved = save(&[]);
    assert!(moved.status.success(), "{}", text(&moved.stderr));
    assert!(text(&moved.stderr).contains("moves the guest into file:/"), "{}", text(&moved.stderr));
    assert_eq!(status(&source).unwrap()["state"], "migrated");
    // There is no guest any more, and no process listens there.
    let nowhere = run(&["migrate", "--control", "/nonexistent/control", "file:saved.vhm"]);
    for output in [save(&[]), nowhere] {
        assert!(
            !output.status.success() && !text(&output.stderr).contains("moves the guest"),
            "{}",
            text(&output.stderr)
        );
    }
}

#[test]
fn inspect_log_lists_the_dirty_pages() {
    let host = Host::new();
    let log = host.path("log");
    std::fs::write(&log, [0b0000_0110, 0, 0x80]).unwrap();
    let output = run(&["inspect", "--json", "log", log.to_str().unwrap(), "--memory", "96KiB"]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&found["pages"], &found["runs"]), (&json!(3), &json!(2)), "{found}");
    assert_eq!(found["first"], json!([{"gpa": 0x1000, "pages": 2}, {"gpa": 23 * 4096, "pages": 1}]));
}

#[test]
fn inspect_inflight_lists_the_requests_to_resubmit() {
    let host = Host::new();
    let file = host.path("region");
    // Two entries are marked; the order follows the counters.
    let mut region = vec![0u8; 192];
    region[8..10].copy_from_slice(&1u16.to_le_bytes());
    region[10..12].copy_from_slice(&8u16.to_le_bytes());
    region[14..16].copy_from_slice(&5u16.to_le_bytes());
    for (head, counter) in [(2usize, 9u64), (6, 4)] {
        region[16 + 16 * head] = 1;
        region[24 + 16 * head..32 + 16 * head].copy_from_slice(&counter.to_le_bytes());
    }
    std::fs::write(&file, &region).unwrap();
    let output = run(&["inspect", "--json", "inflight", file.to_str().unwrap()]);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)));
    assert_eq!(found["queues"][0]["resubmit"], json!([{"head": 6, "counter": 4}, {"head": 2, "counter": 9}]));
    assert_eq!(found["queues"][0]["next_avail"], 7);
    region[8] = 77;
    std::fs::write(&file, &region).unwrap();
    let refused = run(&["inspect", "inflight", file.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(1), "a version that nobody wrote");
}

/// Rule I7.1: a zeroed part has version 0 and contains neither requests nor its size.
#[rstest]
#[case::empty_file(0, &[], Err("0 bytes are no inflight region"))]
#[case::not_a_multiple_of_the_part_size(100, &[], Err("100 bytes are no inflight region"))]
#[case::no_matching_queue_size(448, &[], Err("no queue size makes a region of 448 bytes with --queues 1"))]
#[case::eight_entries(192, &[], Ok("room for 8 entries"))]
#[case::two_queues(384, &["--queues", "2"], Ok("room for 8 entries"))]
#[case::given_queue_size(448, &["--queue-size", "16"], Ok("room for 16 entries"))]
#[case::packed(192, &["--packed"], Ok("room for 5 entries"))]
#[case::too_small(192, &["--queue-size", "16"], Err("pass --queues and --queue-size"))]
fn inspect_inflight_distinguishes_an_unused_region_from_other_files(
    #[case] bytes: usize,
    #[case] more: &[&str],
    #[case] said: Result<&str, &str>,
) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes as u64).unwrap();
    let output = run(&[&["inspect", "inflight", file.path().to_str().unwrap()], more].concat());
    let (shown, told) = (text(&output.stdout), text(&output.stderr));
    match said {
        Ok(room) => {
            assert!(output.status.success(), "{told}");
            assert!(shown.contains("version 0: never used, or reset") && shown.contains(room), "{shown}");
        }
        Err(why) => {
            assert_eq!(output.status.code(), Some(1), "{shown}");
            assert!(told.contains(why) && shown.is_empty(), "{told}");
        }
    }
}

#[test]
fn a_back_end_with_too_few_queues_is_refused_with_the_options_of_both_commands() {
    let mut host = Host::new();
    let backend = host.path("one.vhost");
    let mut one = program();
    one.args(["backend", "blk", "--image"]).arg(host.path("disk")).arg("--socket").arg(&backend);
    host.start(&mut one);
    let mut guest = program();
    guest.args(["guest", "--memory", "64MiB", "--backend"]).arg(&backend).arg("--control").arg(host.path("control"));
    let output = guest.output().unwrap();
    let told = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    let advice = "start the back-end with --queues 2, or the guest with --queues 1";
    assert!(told.contains("it has 1 queues, and the guest wants 2") && told.contains(advice), "{told}");
}

#[test]
fn inspect_inflight_lists_the_packed_requests_to_resubmit() {
    let host = Host::new();
    let file = host.path("region");
    // One request of two descriptors in a ring of 4, whose completion was being published.
    let mut region = vec![0u8; 192];
    for (offset, value) in [(8, 1u16), (10, 4), (12, 0), (14, 2), (16, 2), (18, 0)] {
        region[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }
    (region[20], region[21], region[32]) = (1, 1, 1);
    for (entry, next) in [(0, 1u16), (1, 2), (2, 3), (3, 4)] {
        region[34 + 32 * entry..][..2].copy_from_slice(&next.to_le_bytes());
    }
    (region[36], region[38], region[40], region[80]) = (1, 2, 7, 5);
    std::fs::write(&file, &region).unwrap();
    let shown = |options: &[&str]| {
        let output = run(&[&["inspect", "--json", "inflight", file.to_str().unwrap(), "--packed"], options].concat());
        let found: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)));
        (found["queues"][0]["resubmit"].clone(), found["queues"][0]["base"].clone())
    };
    let again = json!([{"entry": 0, "counter": 7, "id": 5, "descriptors": 2}]);
    assert_eq!(shown(&[]), (again, json!(0x8000_8002u32)));
    assert_eq!(shown(&["--published", "0"]), (json!([]), json!(0x8002_8002u32)));
}

fn signal(process: &ChildProcess, signal: Signal) {
    kill(Pid::from_raw(process.0.id() as i32), signal).unwrap();
}

/// Starts a migration that takes a few seconds before the switchover. Returns its events from the second on.
fn migrating(control: &Path, uri: &str) -> (ChildProcess, impl Iterator<Item = Value>) {
    let mut command = program();
    command.args(["migrate", "--json", "--bandwidth", "20MiB/s", "--downtime", "3000", uri, "--control"]).arg(control);
    let mut migration = ChildProcess(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    let lines = BufReader::new(migration.0.stdout.take().unwrap()).lines();
    let mut events = lines.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    assert_eq!(events.next().unwrap()["event"], "started");
    (migration, events)
}

/// Asserts that the guest's CPUs write.
fn assert_guest_progresses(control: &Path) {
    let pages = |status: Option<Value>| status.unwrap()["pages"].as_u64().unwrap();
    let before = pages(status(control));
    wait_until("its CPUs write", || pages(status(control)) != before);
}

#[test]
fn status_and_cancel_reply_while_a_disk_hangs_at_the_switchover() {
    let mut host = Host::new();
    let (source, destination, unix) = host.pair();
    let [backend, ..] = &host.running[..] else { panic!() };
    let backend = Pid::from_raw(backend.0.id() as i32);
    let (mut migration, mut events) = migrating(&source, &unix);
    kill(backend, Signal::SIGSTOP).unwrap();
    // The hanging disk is noticed only when its rings are stopped.
    assert!(events.any(|event| event["event"] == "switchover"));
    let seen = status(&source).unwrap();
    assert_eq!(seen["busy"], "a migration", "{seen}");
    assert_eq!(send_command(&source, &json!({"command": "cancel"})).unwrap(), [json!({"event": "ok"})]);
    let why = expect_failure(&mut migration);
    assert!(why.contains("cancelled") && why.contains("still runs here"), "{why}");
    assert_guest_progresses(&source);
    let seen = status(&source).unwrap();
    assert!(seen["devices"][0]["away_ms"].is_u64() && seen["busy"].is_null(), "{seen}");
    kill(backend, Signal::SIGCONT).unwrap();
    verify(&source);
    // The late replies are handled: the next migration succeeds.
    assert_completed(&migrate(&source, &unix, &[]));
    verify(&destination);
}

#[test]
fn a_migration_cancelled_while_a_hanging_disk_starts_logging_reports_cancelled() {
    let (host, source) = Host::with_source();
    let [.., backend, _] = &host.running[..] else { panic!() };
    let backend = Pid::from_raw(backend.0.id() as i32);
    kill(backend, Signal::SIGSTOP).unwrap();
    let file = format!("file:{}", host.path("guest.vhm").display());
    let output = std::thread::scope(|scope| {
        let migration = scope.spawn(|| migrate(&source, &file, &[]));
        while status(&source).unwrap()["busy"] != "a migration" {
            std::thread::yield_now();
        }
        // The migration soon waits for the disk. An earlier cancellation gives the same result.
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(send_command(&source, &json!({"command": "cancel"})).unwrap(), [json!({"event": "ok"})]);
        migration.join().unwrap()
    });
    kill(backend, Signal::SIGCONT).unwrap();
    let why = text(&output.stderr);
    assert!(output.status.code() == Some(1) && why.trim_end().ends_with("runs here: cancelled"), "{why}");
    verify(&source);
}

#[rstest]
#[case::back_end_returns(true)]
#[case::migration_is_cancelled(false)]
fn a_guest_is_not_paused_while_a_back_end_is_unavailable(#[case] returns: bool) {
    let mut host = Host::new();
    let (source, destination, unix) = host.pair();
    let (mut migration, mut events) = migrating(&source, &unix);
    drop(host.running.remove(0));
    let waiting = events.find(|event| event["event"] == "waiting").unwrap();
    assert!(waiting["message"].as_str().unwrap().contains("source.vhost: its back-end is away"), "{waiting}");
    assert_guest_progresses(&source);
    if returns {
        host.backend("source.vhost");
        assert_eq!(events.last().unwrap()["event"], "completed");
        verify(&destination);
    } else {
        assert_eq!(send_command(&source, &json!({"command": "cancel"})).unwrap(), [json!({"event": "ok"})]);
        assert!(expect_failure(&mut migration).contains("cancelled"));
        assert_guest_progresses(&source);
        host.backend("source.vhost");
        verify(&source);
    }
}

#[test]
fn a_migration_ends_a_dirty_rate_measurement() {
    let mut host = Host::new();
    let (source, destination, unix) = host.pair();
    let mut measuring = program();
    measuring.args(["dirty-rate", "--seconds", "3600", "--control"]).arg(&source);
    let mut measuring = ChildProcess(measuring.stderr(Stdio::piped()).spawn().unwrap());
    wait_until("a measurement", || status(&source).unwrap()["busy"] == "a measurement");
    assert_completed(&migrate(&source, &unix, &[]));
    let why = expect_failure(&mut measuring);
    assert!(why.contains("by a migration"), "{why}");
    verify(&destination);
}

#[rstest]
#[case::one_signal_without_reply(1)]
#[case::two_signals(2)]
fn migrate_ends_at_signals_while_the_guest_process_hangs(#[case] signals: u32) {
    let mut host = Host::new();
    let (source, destination, unix) = host.pair();
    let [_, guest, ..] = &host.running[..] else { panic!() };
    let guest = Pid::from_raw(guest.0.id() as i32);
    let (mut migration, events) = migrating(&source, &unix);
    kill(guest, Signal::SIGSTOP).unwrap();
    for number in 0..signals {
        signal(&migration, [Signal::SIGTERM, Signal::SIGINT][number as usize]);
        // Two signals at once may be delivered as one.
        std::thread::sleep(Duration::from_millis(200));
    }
    assert_eq!(migration.0.wait().unwrap().code(), Some(5));
    drop(events);
    kill(guest, Signal::SIGCONT).unwrap();
    // Timing decides if the cancel command was sent.
    wait_until("the end of the migration", || status(&source).unwrap()["busy"].is_null());
    let left = status(&source).unwrap()["state"] == "migrated";
    verify(if left { &destination } else { &source });
}

#[test]
fn a_guest_migrates_between_two_front_ends_of_one_back_end_and_stays_if_cancelled() {
    let mut host = Host::new();
    let backend = host.backend_with("disk.vhost", &["--front-ends", "2"]);
    let unix = host.unix("incoming");
    let small = ["--memory", "64MiB", "--dirty-rate", "8MiB/s", "--request-rate", "50"];
    let source = host.guest_on(&backend, "source", &small);
    wait_for_state(&source, "running");
    let destination = host.guest_on(&backend, "destination", &["--incoming", &unix]);
    wait_for_state(&destination, "absent");
    let (mut migration, events) = migrating(&source, &unix);
    assert_eq!(send_command(&source, &json!({"command": "cancel"})).unwrap(), [json!({"event": "ok"})]);
    assert!(expect_failure(&mut migration).contains("cancelled"));
    drop(events);
    verify(&source);
    assert_completed(&migrate(&source, &unix, &[]));
    verify(&destination);
    // The disk of a third guest is refused.
    let mut third = program();
    third.args(["guest", "--memory", "64MiB", "--backend"]).arg(&backend);
    let third = third.arg("--control").arg(host.path("third.control")).output().unwrap();
    assert_eq!(third.status.code(), Some(1), "{}", text(&third.stderr));
    verify(&destination);
}
