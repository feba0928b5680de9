//! Messages of a guest's process about its guest, and of both sides of a migration about each other.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use vhost_migrate::stream::{FrameKind, ToSource, Uri};

use super::disks::refused;
use super::outcome::{command, expect_error, expect_ok, source_of_unknown_outcome};
use super::relay::{Direction, Fault, FaultAction, FaultPosition, Relay};
use super::{
    Host, PATIENCE, assert_completed, events, expect_failure, migrate, migrating, program, signal, slow_migration,
    status, text, verify, wait_for_state, wait_until_listening,
};

/// Starts a guest that logs to a file.
fn writing(host: &mut Host, name: &str, more: &[&str]) -> (PathBuf, PathBuf) {
    let backend = host.backend(&format!("{name}.vhost"));
    let (control, log) = (host.path(&format!("{name}.control")), host.path(&format!("{name}.log")));
    let mut command = program();
    command.args(["guest", "--log-level", "info", "--backend"]).arg(backend).arg("--control").arg(&control).args(more);
    host.start(command.stderr(File::create(&log).unwrap()));
    (control, log)
}

fn read(log: &Path) -> String {
    std::fs::read_to_string(log).unwrap()
}

fn wait_for_log(log: &Path, words: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !read(log).contains(words) {
        assert!(Instant::now() < deadline, "not {words:?}: {}", read(log));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_guest_process_logs_start_departure_arrival_and_end() {
    let mut host = Host::new();
    let uri = host.unix("incoming");
    let (source, here) = writing(&mut host, "source", &["--memory", "64MiB"]);
    wait_for_state(&source, "running");
    assert!(read(&here).contains("the guest has started, with disks from"), "{}", read(&here));
    let (destination, there) = writing(&mut host, "destination", &["--incoming", &uri]);
    wait_for_state(&destination, "absent");
    assert_completed(&migrate(&source, &uri, &[]));
    assert!(read(&here).contains(&format!("the guest has moved to {uri}")), "{}", read(&here));
    wait_for_state(&destination, "running");
    assert!(read(&there).contains(&format!("a guest has arrived at {uri} and runs here")), "{}", read(&there));
    expect_ok(&source, "quit");
    wait_for_log(&here, "ends by quit");
    signal(host.running.last().unwrap(), Signal::SIGTERM);
    wait_for_log(&there, "ends by SIGTERM");
}

/// On a busy machine a message may be late: the connection is closed half a second after the cancellation.
#[test]
fn each_side_reports_a_cancellation_by_the_other() {
    let (mut host, source) = Host::with_source();
    let uri = host.unix("incoming");
    let (destination, log) = writing(&mut host, "destination", &["--incoming", &uri]);
    wait_for_state(&destination, "absent");
    wait_until_listening(&destination);
    let deadline = Instant::now() + PATIENCE;
    for (cancelled, words) in [(&source, "the source ended the migration: cancelled"), (&destination, "")] {
        loop {
            assert!(Instant::now() < deadline, "{}", read(&log));
            let (mut slow, _events) = slow_migration(&source, &uri);
            let before = read(&log).len();
            expect_ok(cancelled, "cancel");
            let why = expect_failure(&mut slow);
            wait_for_log(&log, "no guest has arrived");
            let told = match words {
                "" => why.contains("cancelled at the destination"),
                words => read(&log)[before..].contains(words),
            };
            if told {
                break;
            }
        }
    }
    verify(&source);
}

#[test]
fn a_source_warns_within_seconds_that_its_destination_reads_nothing() {
    let (mut host, source) = Host::with_source();
    let uri = host.unix("incoming");
    host.waiting("destination", &uri);
    let (mut migration, mut events) = migrating(&source, &uri);
    signal(host.running.last().unwrap(), Signal::SIGSTOP);
    let warning = events.find(|event| event["event"] == "warning").expect("it fails without a warning");
    assert!(warning["message"].as_str().unwrap().contains("nothing was read by the destination for 5s"), "{warning}");
    signal(host.running.last().unwrap(), Signal::SIGCONT);
    expect_ok(&source, "cancel");
    expect_failure(&mut migration);
    verify(&source);
}

#[test]
fn a_snapshot_of_a_running_guest_gives_a_warning() {
    let (mut host, source) = Host::with_source();
    let file = format!("file:{}", host.path("guest.vhm").display());
    let output = migrate(&source, &file, &["--continue"]);
    assert_completed(&output);
    let warned = |event: &serde_json::Value| event["message"].as_str().is_some_and(|it| it.contains("is not paused"));
    assert!(events(&output).iter().any(warned), "{}", text(&output.stdout));
    verify(&source);
    let backend = host.backend("again.vhost");
    expect_ok(&source, "quit");
    assert!(refused(&host, &backend, &file).contains("was written after the guest was saved"));
}

#[test]
fn status_reports_starting_while_an_arrived_guest_starts() {
    let (mut host, source) = Host::with_source();
    let there = host.unix("incoming");
    let destination = host.waiting("destination", &there);
    let slowly = Fault::new(
        Direction::ToSource,
        FaultPosition::Frame(FrameKind::Ready, 0),
        FaultAction::Trickle(Duration::from_millis(20)),
    );
    let through = host.unix("relay");
    let relay = Relay::new(through.parse::<Uri>().unwrap(), &there.parse().unwrap(), slowly);
    let (mut migration, _events) = migrating(&source, &through);
    while !relay.triggered() {
        std::thread::yield_now();
    }
    // The destination is ready, and its back-end hangs when the guest is to be started.
    let [.., backend, _] = &host.running[..] else { panic!() };
    signal(backend, Signal::SIGSTOP);
    wait_for_state(&destination, "starting");
    for name in ["resume", "forget", "pause"] {
        let words = expect_error(&destination, json!({"command": name}));
        assert!(words.contains("a guest has arrived and is being started here"), "{name}: {words}");
    }
    signal(backend, Signal::SIGCONT);
    verify(&destination);
    assert!(migration.0.wait().unwrap().success());
    assert_eq!(status(&source).unwrap()["state"], "migrated");
}

#[test]
fn a_restore_onto_an_unusable_disk_names_the_disk_and_the_reason() {
    let (mut host, source) = Host::with_source();
    let file = format!("file:{}", host.path("guest.vhm").display());
    assert_completed(&migrate(&source, &file, &[]));
    let image = host.path("disk");
    let backend = host.backend_on(&image, "fixed.vhost", &["--read-only"]);
    let words = refused(&host, &backend, &file);
    assert!(words.contains("fixed.vhost: the guest can't use this device: it is read-only"), "{words}");
    assert!(!words.contains("no such guest"), "{words}");
}

#[test]
fn resume_of_an_unknown_outcome_advises_forget_when_the_disk_is_in_use() {
    let mut host = Host::new();
    let source = source_of_unknown_outcome(&mut host, [ToSource::Unknown, ToSource::Unknown]);
    // In place of the front-end that runs the guest.
    let other = host.guest("other", &["--memory", "64MiB", "--overwrite"]);
    wait_for_state(&other, "running");
    let output = command("resume", &source);
    let words = text(&output.stderr);
    assert!(output.status.code() == Some(1) && words.contains("the destination probably runs the guest"), "{words}");
    assert_eq!(status(&source).unwrap()["state"], "outcome_unknown");
    expect_ok(&source, "forget");
}
