//! Commands to a guest whose disk has wrong contents or whose back-end hangs.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::outcome::expect_ok;
use super::{Host, PATIENCE, migrate, send_command, signal, status, verify, wait_for_state};

/// Sends a command that takes long, and waits until it is under way.
fn with_command_under_way<T>(
    control: &Path,
    command: Value,
    busy: &str,
    meanwhile: impl FnOnce() -> T,
) -> (Option<Vec<Value>>, T) {
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| send_command(control, &command));
        let deadline = Instant::now() + PATIENCE;
        while status(control).unwrap()["busy"] != busy {
            assert!(!asked.is_finished() && Instant::now() < deadline, "it is not under way");
            std::thread::sleep(Duration::from_millis(1));
        }
        let expect_ok = meanwhile();
        (asked.join().unwrap(), expect_ok)
    })
}

#[test]
fn a_wrong_byte_found_by_verify_fails_the_guest() {
    let (mut host, source) = Host::with_source();
    expect_ok(&source, "pause");
    // The guest does not read its disk now.
    File::options().write(true).open(host.path("disk")).unwrap().write_all(&vec![0xff; 16 << 20]).unwrap();
    let answer = send_command(&source, &json!({"command": "verify"})).unwrap().pop().unwrap();
    let words = answer["message"].as_str().unwrap();
    assert!(words.contains("WRONG BYTE"), "{answer}");
    let status = status(&source).unwrap();
    assert_eq!((&status["state"], &status["location"]), (&json!("failed"), &json!(null)));
    assert_eq!(status["failure"], words);
    assert_eq!(migrate(&source, "unix:/nonexistent/socket", &[]).status.code(), Some(6));
    expect_ok(&source, "quit");
    assert_eq!(host.running.last_mut().unwrap().0.wait().unwrap().code(), Some(1));
}

#[test]
fn cancel_ends_waits_for_a_hanging_back_end_and_the_guest_goes_on() {
    let (host, source) = Host::with_source();
    let rate = json!({"command": "dirty_rate", "seconds": 1.0, "bandwidth": 1 << 30, "downtime_ms": 300});
    for (command, busy, words) in [
        (json!({"command": "verify"}), "a verification", "was interrupted before its end"),
        (rate, "a measurement", "the measurement was ended"),
    ] {
        signal(&host.running[0], Signal::SIGSTOP);
        let (answer, ()) = with_command_under_way(&source, command, busy, || expect_ok(&source, "cancel"));
        let last = answer.unwrap().pop().unwrap();
        assert!(last["message"].as_str().unwrap_or_default().contains(words), "{last}");
        signal(&host.running[0], Signal::SIGCONT);
        verify(&source);
    }
}

#[test]
fn quit_ends_a_verifying_and_a_booting_guest_whose_back_end_hangs() {
    let (mut host, source) = Host::with_source();
    signal(&host.running[0], Signal::SIGSTOP);
    with_command_under_way(&source, json!({"command": "verify"}), "a verification", || expect_ok(&source, "quit"));
    assert_eq!(host.running.last_mut().unwrap().0.wait().unwrap().code(), Some(0));
    signal(&host.running[0], Signal::SIGCONT);

    let silent = host.path("silent");
    // The socket accepts no connection, so that the guest waits for the reply to its first message.
    let _listener = UnixListener::bind(&silent).unwrap();
    let booting = host.guest_on(&silent, "booting", &["--memory", "64MiB"]);
    wait_for_state(&booting, "absent");
    expect_ok(&booting, "quit");
    // Its connection would have failed.
    assert_eq!(host.running.last_mut().unwrap().0.wait().unwrap().code(), Some(0));
    assert!(!booting.exists(), "its socket is removed");
}
