//! Disks of a restored guest: a disk that has changed since the save is refused (GET_DISK_GENERATION).

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use super::outcome::expect_ok;
use super::{
    ChildProcess, Host, assert_completed, events, migrate, program, run, status, text, verify, wait_for, wait_for_state,
};

/// Pauses a guest and saves it to a file. Returns the URI. The guest is released here unless `more` says otherwise.
fn saved(host: &Host, source: &Path, more: &[&str]) -> String {
    expect_ok(source, "pause");
    let file = format!("file:{}", host.path("guest.vhm").display());
    let output = migrate(source, &file, more);
    assert_completed(&output);
    assert!(!events(&output).iter().any(|event| event["event"] == "warning"), "{}", text(&output.stdout));
    file
}

fn inspected(host: &Host) -> Value {
    let output = run(&["inspect", "--json", "stream", host.path("guest.vhm").to_str().unwrap()]);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", text(&output.stderr)))
}

fn copy(host: &Host, from: &str, to: &str, options: &[&str]) -> PathBuf {
    let to = host.path(to);
    assert!(Command::new("cp").args(options).arg(host.path(from)).arg(&to).status().unwrap().success());
    to
}

/// Starts a restore that must fail.
pub(super) fn refused(host: &Host, backend: &Path, file: &str) -> String {
    let control = host.path("refused.control");
    let mut command = program();
    command.args(["guest", "--incoming", file, "--backend"]).arg(backend).arg("--control").arg(&control);
    let mut guest = ChildProcess(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let ended = wait_for("the end of the restore", || guest.0.try_wait().unwrap());
    let mut words = String::new();
    guest.0.stderr.as_mut().unwrap().read_to_string(&mut words).unwrap();
    assert_eq!(ended.code(), Some(1), "{words}");
    words
}

/// Restores a guest, waits until it has written to its disk, and ends it.
fn restored(host: &mut Host, backend: &Path, name: &str, more: &[&str]) {
    let guest = host.guest_on(backend, name, more);
    wait_for_state(&guest, "paused");
    expect_ok(&guest, "resume");
    verify(&guest);
    expect_ok(&guest, "quit");
    assert_eq!(host.running.last_mut().unwrap().0.wait().unwrap().code(), Some(0));
}

#[test]
fn a_restore_onto_a_changed_disk_needs_ignore_disk_generation() {
    let (mut host, source) = Host::with_source();
    let file = saved(&host, &source, &[]);
    let found = inspected(&host);
    let generation = found["disks"][0]["generation"].as_str().unwrap_or_default();
    assert!(generation.len() == 32 && found["disks"][0]["identity"].as_str().unwrap().len() == 32, "{found}");

    let backend = host.backend("again.vhost");
    // A guest that never runs changes nothing.
    let unused = host.guest_on(&backend, "unused", &["--incoming", &file]);
    wait_for_state(&unused, "paused");
    expect_ok(&unused, "quit");
    host.running.last_mut().unwrap().0.wait().unwrap();
    restored(&mut host, &backend, "first", &["--incoming", &file]);

    let words = refused(&host, &backend, &file);
    assert!(words.contains("again.vhost: it was written after the guest was saved"), "{words}");
    assert!(words.contains("--ignore-disk-generation"), "{words}");
    // Also with a newly started back-end.
    let later = host.backend("later.vhost");
    assert!(refused(&host, &later, &file).contains("was written after the guest was saved"));
    let forced = host.guest_on(&later, "forced", &["--incoming", &file, "--ignore-disk-generation"]);
    wait_for_state(&forced, "paused");
}

#[test]
fn a_snapshot_is_restored_onto_the_disk_copy_made_with_it_and_refused_on_the_live_disk() {
    let (mut host, source) = Host::with_source();
    let file = saved(&host, &source, &["--continue"]);
    copy(&host, "disk", "copy", &["--preserve=xattr"]);
    let bare = copy(&host, "disk", "bare", &[]);
    expect_ok(&source, "resume");
    verify(&source);
    let late = copy(&host, "disk", "late", &["--preserve=xattr"]);
    expect_ok(&source, "quit");

    let [bare, late, other] = [(bare, "bare"), (late, "late"), (host.path("other"), "other")].map(|(image, name)| {
        if name == "other" {
            std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        }
        host.backend_on(&image, &format!("{name}.vhost"), &[])
    });
    let backend = host.backend("disk.vhost");
    assert!(refused(&host, &backend, &file).contains("was written after the guest was saved"));
    assert!(refused(&host, &late, &file).contains("was written after the guest was saved"));
    for another in [&bare, &other] {
        let words = refused(&host, another, &file);
        assert!(words.contains("another disk than the one that the guest was saved with"), "{words}");
        assert!(words.contains("cp --preserve=xattr"), "{words}");
    }
    let image = host.path("copy");
    let copy = host.backend_on(&image, "copy.vhost", &[]);
    restored(&mut host, &copy, "again", &["--incoming", &file]);
}

#[test]
fn save_inspect_and_restore_warn_of_a_disk_without_a_generation() {
    let mut host = Host::new();
    let image = host.path("disk");
    // Other processes may write it at any time.
    let shared = host.backend_on(&image, "shared.vhost", &["--share-rw"]);
    let source = host.guest_on(&shared, "source", &["--memory", "64MiB", "--request-rate", "50"]);
    wait_for_state(&source, "running");
    expect_ok(&source, "pause");
    let file = format!("file:{}", host.path("guest.vhm").display());
    let output = migrate(&source, &file, &[]);
    assert_completed(&output);
    let warning = events(&output).into_iter().find(|event| event["event"] == "warning").unwrap();
    assert!(
        warning["message"].as_str().unwrap().contains("shared.vhost: a restore can't compare this disk"),
        "{warning}"
    );
    assert_eq!(inspected(&host)["disks"], json!([null]));
    let words = run(&["inspect", "stream", host.path("guest.vhm").to_str().unwrap()]);
    assert!(text(&words.stdout).contains("disk 0: not known, so that a restore can't compare it"));

    let backend = host.backend("again.vhost");
    let mut command = program();
    let control = host.path("again.control");
    command.args(["guest", "--incoming", &file, "--backend"]).arg(&backend).arg("--control").arg(&control);
    let mut guest = ChildProcess(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    wait_for_state(&control, "paused");
    expect_ok(&control, "quit");
    let mut said = String::new();
    guest.0.stderr.as_mut().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("again.vhost: this disk is not compared"), "{said}");
}

/// Starts a destination with this back-end.
fn arriving_on(host: &mut Host, backend: &Path, name: &str, more: &[&str]) -> (PathBuf, String) {
    let uri = format!("unix:{}.incoming", host.path(name).display());
    let destination = host.guest_on(backend, name, &[&["--incoming", &uri], more].concat());
    wait_for_state(&destination, "absent");
    (destination, uri)
}

#[test]
fn a_migration_to_another_disk_needs_ignore_disk_generation() {
    let (mut host, source) = Host::with_source();
    // A disk of the same size with a copy of the contents.
    let other = copy(&host, "disk", "other", &[]);
    let backend = host.backend_on(&other, "other.vhost", &[]);
    let (destination, uri) = arriving_on(&mut host, &backend, "refusing", &[]);
    let refused = migrate(&source, &uri, &[]);
    let why = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{why}");
    assert!(why.contains("other.vhost: it is another disk than the guest's at the source"), "{why}");
    assert!(why.contains("--ignore-disk-generation"), "{why}");
    verify(&source);
    assert_eq!(status(&destination).unwrap()["state"], "absent");
    expect_ok(&destination, "quit");

    // Sectors that the guest has not written are equal on both disks.
    expect_ok(&source, "pause");
    let (destination, uri) = arriving_on(&mut host, &backend, "forced", &["--ignore-disk-generation"]);
    assert_completed(&migrate(&source, &uri, &[]));
    assert_eq!(status(&destination).unwrap()["state"], "paused");
}

/// Rule G1.1.
#[test]
fn a_migration_to_a_disk_of_the_same_or_unknown_identity_succeeds() {
    let (mut host, source) = Host::with_source();
    expect_ok(&source, "pause");
    let copy = copy(&host, "disk", "copy", &["--preserve=xattr"]);
    let backend = host.backend_on(&copy, "copy.vhost", &[]);
    let (second, uri) = arriving_on(&mut host, &backend, "second", &[]);
    assert_completed(&migrate(&source, &uri, &[]));
    wait_for_state(&second, "paused");
    // Other processes may write it at any time: it has no identity.
    let bare = host.path("bare");
    std::fs::File::create(&bare).unwrap().set_len(16 << 20).unwrap();
    let backend = host.backend_on(&bare, "bare.vhost", &["--share-rw"]);
    let (third, uri) = arriving_on(&mut host, &backend, "third", &[]);
    assert_completed(&migrate(&second, &uri, &[]));
    wait_for_state(&third, "paused");
}
