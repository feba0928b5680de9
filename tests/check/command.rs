//! The command `check`: exit status, output, and the back-ends that it starts and kills.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use roxmltree::Document;
use serde_json::Value;

use crate::fault::Fault;
use crate::faulty_backend::{Backend, image};
use crate::wait::wait_until;

const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-migrate");

pub(crate) fn command(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).arg("check").args(arguments).output().unwrap()
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the command with `--json`. Returns the report and the exit status.
pub(crate) fn report(arguments: &[&str]) -> (Value, Option<i32>) {
    let output = command(&[arguments, &["--json"]].concat());
    let report = serde_json::from_slice(&output.stdout);
    (report.unwrap_or_else(|_| panic!("{arguments:?}: {}", text(&output.stderr))), output.status.code())
}

/// Starts a process and waits until it serves the socket.
pub(crate) fn serving(arguments: &[&str], socket: &Path) -> Child {
    let child = Command::new(PROGRAM).args(arguments).spawn().unwrap();
    wait_until(&format!("it serves {}", socket.display()), || UnixStream::connect(socket).is_ok());
    child
}

/// Compares a JUnit file with the report: one test case per finding.
pub(crate) fn same(xml: &str, report: &Value) {
    let document = Document::parse(xml).unwrap();
    let suite = document.root_element();
    assert_eq!(suite.tag_name().name(), "testsuite");
    let cases: Vec<_> = suite.children().filter(|node| node.is_element()).collect();
    let findings = report["report"]["findings"].as_array().unwrap();
    assert_eq!(cases.len(), findings.len());
    let count = |name: &str| suite.descendants().filter(|node| node.has_tag_name(name)).count().to_string();
    let attribute = |name: &str| suite.attribute(name).unwrap().to_string();
    assert_eq!(attribute("tests"), cases.len().to_string());
    assert_eq!((attribute("failures"), attribute("skipped")), (count("failure"), count("skipped")));
    assert_eq!(attribute("errors"), "0");
    let seconds = |node: &roxmltree::Node<'_, '_>| node.attribute("time").unwrap().parse::<f64>().unwrap();
    let sum: f64 = cases.iter().map(seconds).sum();
    assert!((seconds(&suite) - sum).abs() <= 0.001 * (cases.len() + 1) as f64, "{xml}");
    for (case, finding) in cases.iter().zip(findings) {
        let [rule, what, rings, verdict, seen] =
            ["rule", "what", "rings", "verdict", "seen"].map(|name| finding[name].as_str().unwrap());
        let rings = if rings.is_empty() { String::new() } else { format!(" ({rings})") };
        assert_eq!(case.attribute("classname"), Some(rule));
        assert_eq!(case.attribute("name"), Some(&*format!("{rule} {what}{rings}")));
        let inside: Vec<_> = case.children().filter(|node| node.is_element()).collect();
        assert_eq!(inside.len(), 1, "{finding}");
        let (name, message) = (inside[0].tag_name().name(), inside[0].attribute("message"));
        let words = verdict.replace('-', " ");
        match verdict {
            "fail" => assert_eq!((name, message), ("failure", Some(seen))),
            "not-tested" | "not-offered" => {
                assert_eq!((name, message), ("skipped", Some(&*format!("{words}: {seen}"))))
            }
            _ => assert_eq!((name, inside[0].text()), ("system-out", Some(&*format!("{words}: {seen}")))),
        }
    }
}

#[test]
fn a_failed_rule_gives_exit_status_1_and_a_junit_failure_and_a_warning_gives_neither() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("check.xml");
    let xml = || std::fs::read_to_string(&file).unwrap();
    let junit = ["--junit", file.to_str().unwrap()];
    let backend = Backend::start(Fault::IgnoresConfigOffset);
    let socket = backend.socket();
    let (found, status) = report(&[&[socket.to_str().unwrap(), "--only", "c1,F5,l14"], &junit[..]].concat());
    assert_eq!((status, &found["failed"]), (Some(1), &true.into()), "{found:#}");
    assert_eq!(found["rules"], serde_json::json!({"C1": "fail", "F5": "pass", "L14": "not-tested"}));
    same(&xml(), &found);
    assert!(xml().contains("failures=\"1\""), "{}", xml());
    let output = command(&[socket.to_str().unwrap(), "--only", "C1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stdout).contains("C1    fail"), "{}", text(&output.stdout));

    let backend = Backend::start(Fault::MarksEverything);
    let socket = backend.socket();
    let (found, status) = report(&[&[socket.to_str().unwrap(), "--only", "L1"], &junit[..]].concat());
    assert_eq!((status, &found["failed"]), (Some(0), &false.into()), "{found:#}");
    assert_eq!(found["rules"], serde_json::json!({"L1": "warning"}));
    same(&xml(), &found);
}

#[test]
fn strict_gives_warnings_exit_status_4_and_leaves_failures_at_1() {
    for (fault, only, strict, usual) in
        [(Fault::None, "L1", 0, 0), (Fault::MarksEverything, "L1", 4, 0), (Fault::IgnoresConfigOffset, "C1", 1, 1)]
    {
        let backend = Backend::start(fault);
        let socket = backend.socket();
        let arguments = [socket.to_str().unwrap(), "--rings", "split", "--only", only];
        let (found, status) = report(&[&arguments[..], &["--strict"]].concat());
        assert_eq!(status, Some(strict), "{fault:?} {found:#}");
        let (found, status) = report(&arguments);
        assert_eq!(status, Some(usual), "{fault:?} {found:#}");
    }
}

#[test]
fn a_closed_stdout_changes_neither_the_junit_file_nor_the_exit_status() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("check.xml");
    let backend = Backend::start(Fault::IgnoresConfigOffset);
    for more in [&[][..], &["--json"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(PROGRAM);
        command.arg("check").arg(backend.socket()).args(["--only", "C1", "--junit"]).arg(&file).args(more);
        let output = command.stdout(writer).stderr(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
        let xml = std::fs::read_to_string(&file).unwrap();
        assert!(Document::parse(&xml).unwrap().descendants().any(|node| node.has_tag_name("failure")), "{xml}");
        std::fs::remove_file(&file).unwrap();
    }
}

#[test]
fn an_unwritable_junit_path_is_reported_before_connecting_to_the_back_end() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = folder.path().join("missing/check.xml");
    let output = command(&["/nobody", "--junit", nowhere.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("cannot write the findings to"), "{}", text(&output.stderr));
}

#[test]
fn exit_status_2_is_for_wrong_arguments_and_3_for_back_ends_that_cannot_be_checked() {
    let folder = tempfile::tempdir().unwrap();
    let no_socket = folder.path().join("nobody");
    let no_socket = no_socket.to_str().unwrap();
    let unreachable = command(&[no_socket]);
    assert_eq!(unreachable.status.code(), Some(3));
    assert!(text(&unreachable.stderr).contains("check that the back-end is running"), "{}", text(&unreachable.stderr));
    for wrong in [
        &[no_socket, "--queue-size", "100"][..],
        &[no_socket, "--frame-source", ""],
        &[no_socket, "--kill-pid", "5"],
        &[no_socket, "--timeout", "0"],
        &[],
    ] {
        assert_eq!(command(wrong).status.code(), Some(2), "{wrong:?}");
    }
    let unknown = command(&[no_socket, "--only", "R3,X1"]);
    assert_eq!(unknown.status.code(), Some(2));
    let stderr = text(&unknown.stderr);
    assert!(stderr.contains("there is no rule \"X1\"") && stderr.contains("R9, R10, R11, R12, T1"), "{stderr}");
    assert_eq!(command(&[no_socket, "--restart", "false"]).status.code(), Some(3));
    // A back-end that accepts and does not reply, and one that closes the connection.
    for hold in [true, false] {
        let socket = folder.path().join(format!("mute-{hold}"));
        let listener = UnixListener::bind(&socket).unwrap();
        let mute = thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            if hold {
                let _ = connection.read_to_end(&mut Vec::new());
            }
        });
        let output = command(&[socket.to_str().unwrap(), "--timeout", "1"]);
        assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
        mute.join().unwrap();
    }
}

#[test]
fn explain_prints_a_rule_without_a_back_end() {
    for id in ["R3", "r3"] {
        let output = command(&["--explain", id]);
        let stdout = text(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        let parts = ["R3.1 GET_VRING_BASE stops the ring.", "If broken: live migration loses pages.", "Remedy: "];
        assert!(parts.iter().all(|part| stdout.contains(part)), "{stdout}");
    }
    let unknown = command(&["--explain", "X1"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(text(&unknown.stderr).contains("there is no rule \"X1\""), "{}", text(&unknown.stderr));
    assert_eq!(command(&["--explain", "R3", "/nobody"]).status.code(), Some(2));
}

#[test]
fn output_is_coloured_on_a_terminal_unless_no_color_is_set() {
    let backend = Backend::start(Fault::IgnoresConfigOffset);
    let check = format!("{PROGRAM} check {} --only C1", backend.socket().display());
    // script(1) runs the command on a terminal.
    for (no_color, coloured) in [(None, true), (Some(""), true), (Some("1"), false)] {
        let mut script = Command::new("script");
        script.args(["-qec", &check, "/dev/null"]).env_remove("NO_COLOR").stdin(Stdio::null());
        script.envs(no_color.map(|value| ("NO_COLOR", value)));
        let output = script.output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
        let stdout = text(&output.stdout);
        assert_eq!(stdout.contains("\x1b[31mfail"), coloured, "{no_color:?}: {stdout:?}");
    }
    let piped = command(&[backend.socket().to_str().unwrap(), "--only", "C1"]);
    assert!(!text(&piped.stdout).contains('\x1b'), "{}", text(&piped.stdout));
}

#[test]
fn a_busy_back_end_is_reported_as_busy_and_not_as_speaking_another_protocol() {
    let backend = Backend::start(Fault::None);
    let socket = backend.socket();
    let front_end = UnixStream::connect(&socket).unwrap();
    let output = command(&[socket.to_str().unwrap(), "--timeout", "1"]);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(
        stderr.contains("It serves another front-end or is stuck") && !stderr.contains("negotiation failed"),
        "{stderr}"
    );
    drop(front_end);
    // A back-end that reads and does not reply.
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("mute");
    let listener = UnixListener::bind(&socket).unwrap();
    let mute = thread::spawn(move || listener.accept().unwrap().0.read_to_end(&mut Vec::new()));
    let stderr = text(&command(&[socket.to_str().unwrap(), "--timeout", "1"]).stderr);
    assert!(stderr.contains("the vhost-user negotiation failed"), "{stderr}");
    mute.join().unwrap().unwrap();
}

#[test]
fn a_running_back_end_is_killed_only_with_kill_pid() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path()).image;
    let socket = folder.path().join("socket");
    let (path, disk) = (socket.to_str().unwrap(), image.to_str().unwrap());
    let arguments = ["backend", "blk", "--socket", path, "--image", disk];
    let mut backend = serving(&arguments, &socket);
    let start = format!("{PROGRAM} {}", arguments.join(" "));
    let refused = command(&[path, "--restart", &start]);
    assert_eq!(refused.status.code(), Some(3));
    assert!(
        text(&refused.stderr).contains("another process serves this socket. Give --kill-pid"),
        "{}",
        text(&refused.stderr)
    );
    assert!(backend.try_wait().unwrap().is_none(), "it was killed without being asked for");

    let pid = backend.id().to_string();
    let (found, status) = report(&[path, "--only", "I3,I4", "--restart", &start, "--kill-pid", &pid]);
    assert_eq!(status, Some(0), "{found:#}");
    assert_eq!(found["rules"], serde_json::json!({"I3": "pass", "I4": "pass"}), "{found:#}");
    assert_eq!(backend.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
    assert!(UnixStream::connect(&socket).is_err(), "what the check started outlived it");
}

#[test]
fn a_kill_pid_of_another_process_gives_not_tested() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path()).image;
    let socket = folder.path().join("socket");
    let (path, disk) = (socket.to_str().unwrap(), image.to_str().unwrap());
    let mut backend = serving(&["backend", "blk", "--socket", path, "--image", disk], &socket);
    let mut other = Command::new("sleep").arg("600").spawn().unwrap();
    let pid = other.id().to_string();
    let (found, status) =
        report(&[path, "--only", "I3", "--rings", "split", "--timeout", "1", "--restart", "true", "--kill-pid", &pid]);
    assert_eq!(status, Some(0), "{found:#}");
    let killed = found["report"]["findings"][1].clone();
    assert_eq!(killed["verdict"], "not-tested", "{found:#}");
    assert!(killed["seen"].as_str().unwrap().contains("Check that the process id"), "{found:#}");
    assert!(backend.try_wait().unwrap().is_none());
    backend.kill().unwrap();
    backend.wait().unwrap();
    assert_eq!(other.wait().unwrap().signal(), Some(Signal::SIGKILL as i32));
}

#[test]
fn a_back_end_that_does_not_restart_fails_r9() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path()).image;
    let socket = folder.path().join("socket");
    let script = folder.path().join("start");
    let once = folder.path().join("once");
    let (path, once, disk) = (socket.to_str().unwrap(), once.display(), image.display());
    let backend = format!("exec {PROGRAM} backend blk --socket {path} --image {disk}");
    std::fs::write(&script, format!("mkdir {once} || exit 7\n{backend}\n")).unwrap();
    let start = format!("sh {}", script.display());
    let (found, status) = report(&[path, "--only", "R9,I3,I6", "--rings", "split", "--restart", &start]);
    assert_eq!((status, &found["rules"]["R9"]), (Some(1), &"fail".into()), "{found:#}");
    let findings = found["report"]["findings"].as_array().unwrap();
    let of = |what: &str| findings.iter().find(|finding| finding["what"].as_str().unwrap().contains(what)).unwrap();
    assert!(of("SIGKILL")["seen"].as_str().unwrap().contains("exited with exit status: 7"), "{found:#}");
    // Later checks were not run.
    assert!(of("counters")["seen"].as_str().unwrap().starts_with("the back-end is gone since"), "{found:#}");
    assert_eq!(of("counters")["verdict"], "not-tested");
}

#[test]
fn a_write_that_lands_after_its_process_died_fails_i9() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path()).image;
    let socket = folder.path().join("socket");
    let (path, disk) = (socket.to_str().unwrap(), image.to_str().unwrap());
    // Simulates late I/O of a killed process: when all sectors are written, the old contents return.
    let file = File::options().read(true).write(true).open(&image).unwrap();
    let (over, bytes) = (Arc::new(AtomicBool::new(false)), 20 * 102 * 512);
    let at = file.metadata().unwrap().len() - bytes;
    let ended = over.clone();
    let late = thread::spawn(move || {
        let (mut before, mut now) = (vec![0; bytes as usize], vec![0; bytes as usize]);
        file.read_exact_at(&mut before, at).unwrap();
        while !ended.load(Ordering::Relaxed) {
            file.read_exact_at(&mut now, at).unwrap();
            if before.chunks(512).zip(now.chunks(512)).all(|(before, now)| before != now) {
                file.write_all_at(&before, at).unwrap();
            }
            thread::sleep(Duration::from_millis(1));
        }
    });
    let start = format!("{PROGRAM} backend blk --socket {path} --image {disk}");
    let (found, status) = report(&[path, "--only", "I9", "--write", "--restart", &start]);
    over.store(true, Ordering::Relaxed);
    late.join().unwrap();
    assert_eq!((status, &found["rules"]["I9"]), (Some(1), &"fail".into()), "{found:#}");
}
