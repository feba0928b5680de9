//! Location of the guest after a migration, as reported to the operator, and the operator's commands.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vhost_migrate::stream::{
    FrameKind, Held, IncomingConnection, Started, StreamListener, StreamOptions, ToSource, Uri,
};

use crate::relay::{Direction, Fault, FaultAction, FaultPosition, Relay};
use crate::{
    Host, PATIENCE, assert_completed, expect_failure, migrate, migrating, run, send_command, signal, slow_migration,
    status, text, verify, wait_for_state, wait_until_listening,
};

/// Starts a destination that disappears after it has read the commit, and in its place another process that answers
/// outcome queries with `answers` in turn.
fn destination_gone_after_commit(
    uri: &str,
    answers: impl IntoIterator<Item = ToSource, IntoIter: Send> + 'static,
) -> Receiver<()> {
    let (ready, is_ready) = channel();
    let listener = StreamListener::bind(&uri.parse().unwrap()).unwrap();
    let mut answers = answers.into_iter();
    std::thread::spawn(move || {
        ready.send(()).unwrap();
        let options = StreamOptions::new().unwrap().with_deadline(Some(PATIENCE)).with_timeout(Some(PATIENCE));
        while let Ok(incoming) = listener.next(&options) {
            match incoming {
                IncomingConnection::OutcomeQuery(query) => {
                    let Some(answer) = answers.next() else { return };
                    query.reply(&answer).unwrap();
                }
                IncomingConnection::Migration(connection) => {
                    // All channels except 0 carry only pages.
                    for mut reader in connection.readers().into_iter().skip(1) {
                        std::thread::spawn(move || {
                            while reader.next_frame().is_ok_and(|header| reader.body(&header, &mut Vec::new()).is_ok())
                            {
                            }
                        });
                    }
                    let (mut reader, mut writer) = (connection.readers().remove(0), connection.writers().remove(0));
                    let mut body = Vec::new();
                    loop {
                        let header = reader.next_frame().unwrap();
                        reader.body(&header, &mut body).unwrap();
                        match header.kind {
                            FrameKind::Layout => drop(ToSource::Accepted.write(&mut writer).unwrap()),
                            FrameKind::State => drop(ToSource::Ready.write(&mut writer).unwrap()),
                            FrameKind::Commit => break,
                            _ => {}
                        }
                    }
                    connection.channels.iter().for_each(|channel| channel.shutdown());
                }
            }
        }
    });
    is_ready
}

pub(super) fn command(name: &str, control: &Path) -> Output {
    run(&[name, "--control", control.to_str().unwrap()])
}

/// Sends a control command that must fail. Returns the error message.
pub(super) fn expect_error(control: &Path, command: Value) -> String {
    let answer = send_command(control, &command).unwrap().pop().unwrap();
    assert_eq!(answer["event"], "error", "{answer}");
    answer["message"].as_str().unwrap().to_owned()
}

pub(super) fn expect_ok(control: &Path, command: &str) {
    let answer = send_command(control, &json!({"command": command})).unwrap();
    assert_eq!(answer.last().unwrap()["event"], "ok", "{answer:?}");
}

/// Starts a source and migrates its guest with unknown outcome.
pub(super) fn source_of_unknown_outcome(
    host: &mut Host,
    answers: impl IntoIterator<Item = ToSource, IntoIter: Send> + 'static,
) -> PathBuf {
    let source = host.source();
    migrate_to_unknown_outcome(host, &source, answers);
    source
}

fn migrate_to_unknown_outcome(
    host: &Host,
    source: &Path,
    answers: impl IntoIterator<Item = ToSource, IntoIter: Send> + 'static,
) {
    let uri = host.unix("nowhere");
    let _ = std::fs::remove_file(host.path("nowhere"));
    destination_gone_after_commit(&uri, answers).recv().unwrap();
    let output = migrate(source, &uri, &[]);
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{words}");
    assert!(words.contains("the outcome is unknown") && words.contains("vhost-migrate forget"), "{words}");
    let last: Value = serde_json::from_str(text(&output.stdout).lines().last().unwrap()).unwrap();
    assert_eq!((&last["event"], &last["location"]), (&json!("failed"), &json!("outcome_unknown")));
    let status = status(source).unwrap();
    assert_eq!((&status["state"], &status["location"]), (&json!("outcome_unknown"), &json!("outcome_unknown")));
}

#[test]
fn a_guest_of_unknown_outcome_stays_paused_until_resume_or_forget() {
    let mut host = Host::new();
    let source = source_of_unknown_outcome(&mut host, [ToSource::Unknown, ToSource::Unknown]);
    for command in ["pause", "quit"] {
        let words = expect_error(&source, json!({"command": command}));
        assert!(words.contains("run resume if the destination does not run it"), "{command}: {words}");
    }
    assert_eq!(migrate(&source, "unix:/nonexistent/socket", &[]).status.code(), Some(3));
    // The destination does not run it.
    let output = command("resume", &source);
    assert!(output.status.success(), "{}", text(&output.stderr));
    verify(&source);
    let words = expect_error(&source, json!({"command": "forget"}));
    assert!(words.contains("the guest is here"), "{words}");
    // The destination runs it.
    migrate_to_unknown_outcome(&host, &source, [ToSource::Unknown]);
    let output = command("forget", &source);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(status(&source).unwrap()["location"], "handed_over");
    for name in ["resume", "forget"] {
        let output = command(name, &source);
        assert!(output.status.code() == Some(1) && text(&output.stderr).contains("handed over"), "{output:?}");
    }
    assert_eq!(migrate(&source, "unix:/nonexistent/socket", &[]).status.code(), Some(6));
    expect_ok(&source, "quit");
}

#[test]
fn resume_is_refused_when_the_destination_has_the_guest() {
    let mut host = Host::new();
    let held = ToSource::Held(Held { starting: false, message: "its disk is away".into() });
    let answers = [ToSource::Unknown, held, ToSource::Started(Started::default())];
    let source = source_of_unknown_outcome(&mut host, answers);
    let output = command("resume", &source);
    assert!(text(&output.stderr).contains("its disk is away"), "{}", text(&output.stderr));
    assert_eq!((output.status.code(), &status(&source).unwrap()["state"]), (Some(1), &json!("outcome_unknown")));
    let output = command("resume", &source);
    assert!(
        text(&output.stderr).contains("the destination confirms that it runs the guest"),
        "{}",
        text(&output.stderr)
    );
    assert_eq!((output.status.code(), &status(&source).unwrap()["state"]), (Some(1), &json!("migrated")));
}

#[test]
fn a_source_that_misses_started_completes_by_an_outcome_query() {
    let mut host = Host::new();
    let (source, destination, incoming) = host.pair();
    let fault = Fault::new(Direction::ToSource, FaultPosition::Frame(FrameKind::Started, 0), FaultAction::Cut);
    let there: Uri = incoming.parse().unwrap();
    let relay = Relay::new(host.unix("relay").parse().unwrap(), &there, fault);
    let output = migrate(&source, &host.unix("relay"), &[]);
    assert!(relay.triggered());
    assert!(text(&output.stdout).contains("\"asking\""), "{}", text(&output.stdout));
    assert_completed(&output);
    drop(relay);
    assert_eq!(status(&source).unwrap()["location"], "handed_over");
    verify(&destination);
}

#[test]
fn a_destination_killed_after_ready_leaves_an_unknown_outcome() {
    let mut host = Host::new();
    let (source, _, incoming) = host.pair();
    let fault =
        Fault::new(Direction::ToDestination, FaultPosition::Frame(FrameKind::Commit, 0), FaultAction::CutForGood);
    let there: Uri = incoming.parse().unwrap();
    let relay = Relay::new(host.unix("relay").parse().unwrap(), &there, fault);
    let mut sent = std::thread::scope(|scope| {
        let sent = scope.spawn(|| migrate(&source, &host.unix("relay"), &[]));
        while !relay.triggered() && !sent.is_finished() {
            std::thread::yield_now();
        }
        sent.join().unwrap()
    });
    // Kills the destination and its back-end.
    host.running.truncate(host.running.len() - 2);
    drop(relay);
    assert_eq!(sent.status.code(), Some(3), "{}", text(&sent.stderr));
    sent = command("resume", &source);
    assert!(sent.status.success(), "{}", text(&sent.stderr));
    verify(&source);
}

#[test]
fn a_commit_read_after_the_switchover_timeout_has_no_effect() {
    let (mut host, source) = Host::with_source();
    let destination = host.guest("destination", &["--incoming", &host.unix("incoming"), "--switchover-timeout", "1s"]);
    wait_for_state(&destination, "absent");
    let there: Uri = host.unix("incoming").parse().unwrap();
    let slowly = Fault::new(
        Direction::ToSource,
        FaultPosition::Frame(FrameKind::Ready, 0),
        FaultAction::Trickle(Duration::from_millis(20)),
    );
    let relay = Relay::new(host.unix("relay").parse().unwrap(), &there, slowly);
    let through = host.unix("relay");
    let (mut migration, _events) = migrating(&source, &through);
    while !relay.triggered() {
        std::thread::yield_now();
    }
    let process = host.running.last().unwrap();
    signal(process, Signal::SIGSTOP);
    // The source receives READY and sends the commit meanwhile, and the destination's timeout passes.
    std::thread::sleep(Duration::from_secs(2));
    signal(process, Signal::SIGCONT);
    let why = expect_failure(&mut migration);
    assert!(why.contains("the guest still runs here") && why.contains("took longer than 1s"), "{why}");
    assert_eq!(status(&destination).unwrap()["state"], "absent");
    verify(&source);
}

#[test]
fn a_migration_to_an_occupied_destination_is_refused_at_once() {
    let mut host = Host::new();
    let (source, destination, incoming) = host.pair();
    assert_completed(&migrate(&source, &incoming, &[]));
    wait_for_state(&destination, "running");
    let output = migrate(&destination, &incoming, &[]);
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{words}");
    assert!(words.contains("the peer closed the connection"), "{words}");
    verify(&destination);
}

#[test]
fn a_paused_guest_is_migrated_saved_and_restored_paused() {
    let (mut host, source) = Host::with_source();
    expect_ok(&source, "pause");
    let second = host.waiting("second", &host.unix("incoming"));
    assert_completed(&migrate(&source, &host.unix("incoming"), &[]));
    assert_eq!(wait_for_state(&second, "paused")["location"], "paused_here");
    let (before, after) = (status(&second).unwrap(), status(&second).unwrap());
    assert_eq!(before["pages"], after["pages"]);
    let words = migrate(&second, "unix:/nonexistent/socket", &[]);
    assert!(words.status.code() == Some(4) && text(&words.stderr).contains("is paused here"), "{words:?}");
    expect_ok(&second, "resume");
    verify(&second);
    expect_ok(&second, "pause");
    let file = format!("file:{}", host.path("guest.vhm").display());
    assert_completed(&migrate(&second, &file, &[]));
    let third = host.destination("third", &file);
    wait_for_state(&third, "paused");
    expect_ok(&third, "resume");
    verify(&third);
}

#[test]
fn quit_ends_an_idle_destination_at_once() {
    let mut host = Host::new();
    let destination = host.waiting("destination", &host.unix("incoming"));
    expect_ok(&destination, "quit");
    assert_eq!(host.running.last_mut().unwrap().0.wait().unwrap().code(), Some(0));
    assert!(!destination.exists() && !host.path("incoming").exists(), "its sockets are removed");
}

#[test]
fn quit_at_the_destination_during_a_migration_leaves_the_guest_running_at_its_source() {
    let mut host = Host::new();
    let (source, destination, incoming) = host.pair();
    let (mut slow, _events) = slow_migration(&source, &incoming);
    expect_ok(&destination, "quit");
    assert_eq!(host.running.last_mut().unwrap().0.wait().unwrap().code(), Some(0));
    let why = expect_failure(&mut slow);
    assert!(why.contains("the guest still runs here"), "{why}");
    verify(&source);
}

#[test]
fn cancel_at_the_destination_ends_a_migration_and_the_next_one_succeeds() {
    let mut host = Host::new();
    let (source, destination, incoming) = host.pair();
    wait_until_listening(&destination);
    let (mut slow, _events) = slow_migration(&source, &incoming);
    expect_ok(&destination, "cancel");
    expect_failure(&mut slow);
    assert_completed(&migrate(&source, &incoming, &[]));
    verify(&destination);
}

#[test]
fn migrate_exits_with_5_without_contact_to_the_guest_process() {
    let mut host = Host::new();
    let output = migrate(&host.path("nothing"), "unix:x", &[]);
    let words = text(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{words}");
    assert!(
        words.contains("no contact")
            && words.contains("Is the guest's process running")
            && !words.contains("runs here"),
        "{words}"
    );

    let (source, destination, incoming) = host.pair();
    let (mut slow, _events) = slow_migration(&source, &incoming);
    // Kills back-end and guest of the source.
    host.running.drain(..2);
    assert_eq!(slow.0.wait().unwrap().code(), Some(5));
    assert_eq!(status(&destination).unwrap()["state"], "absent");
}

/// Starts a relay to the control socket that breaks once, at an event of this kind.
fn migrate_with_broken_event_stream(host: &Host, control: &Path, event: &'static str) -> PathBuf {
    let path = host.path("fragile");
    let listener = UnixListener::bind(&path).unwrap();
    let (control, broken) = (control.to_owned(), Arc::new(AtomicBool::new(false)));
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), UnixStream::connect(&control));
            let (broken, there) = (broken.clone(), client.try_clone().unwrap());
            let Ok(server) = server else { return };
            let (mut asks, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut asks, &mut to));
            std::thread::spawn(move || {
                for line in BufReader::new(server).lines().map_while(Result::ok) {
                    if line.contains(event) && !broken.swap(true, Ordering::Relaxed) {
                        break;
                    }
                    let _ = (&client).write_all(format!("{line}\n").as_bytes());
                }
                let _ = there.shutdown(Shutdown::Both);
            });
        }
    });
    path
}

#[test]
fn migrate_polls_the_status_when_its_event_stream_breaks() {
    let mut host = Host::new();
    let (source, destination, incoming) = host.pair();
    let migrate_with_broken_event_stream = migrate_with_broken_event_stream(&host, &source, "\"switchover\"");
    let output = migrate(&migrate_with_broken_event_stream, &incoming, &[]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("the guest was handed over"), "{}", text(&output.stderr));
    verify(&destination);
}

#[test]
fn one_way_is_opt_in_and_leaves_the_outcome_unknown() {
    let (mut host, source) = Host::with_source();
    let saved = host.path("saved");
    let output = migrate(&source, &format!("exec:cat >{}", saved.display()), &["--one-way"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("one way"), "{}", text(&output.stderr));
    // The operator knows what the command does.
    assert!(command("forget", &source).status.success());
    verify(&host.destination("restored", &format!("exec:cat {}", saved.display())));
}
