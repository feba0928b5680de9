//! A back-end that connects to its front-end (`--connect`), for QEMU's `server=on` and OVS.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use vhost_migrate::abi::vhost_user::FrontendRequest as Code;

use crate::raw::{DEADLINE, RawFrontend, VERSION};
use crate::server::{Process, disk_options};
use crate::wait::is_readable;

fn start(socket: &Path, device: &[&str]) -> Process {
    let mut command = match device {
        ["net", more @ ..] => Process::command_of("net", more),
        more => Process::command(more),
    };
    command.arg("--connect").arg(socket).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    // The process handles signals once it has written this line.
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("serves "), "{line}");
    Process { child }
}

/// Accepts the next connection of the back-end.
fn accepted(listener: &UnixListener) -> RawFrontend {
    assert!(is_readable(listener, DEADLINE.as_millis() as u16), "nobody connects");
    let socket = listener.accept().unwrap().0;
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    RawFrontend { socket }
}

fn answers(client: &RawFrontend) {
    client.send(Code::GET_FEATURES, VERSION, &[], &[]);
    assert_eq!(client.reply(Code::GET_FEATURES).len(), 8);
}

fn ends_at_sigterm(child: &mut Child) {
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[rstest]
#[case::disk(&[])]
#[case::network_interface(&["net", "--loopback"])]
fn a_back_end_connects_to_a_listening_front_end_and_reconnects_after_hang_up(#[case] device: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let image = disk_options(folder.path(), 1 << 20, |_| ()).image;
    let socket = folder.path().join("front-end");
    let image = ["--image", image.to_str().unwrap()];
    let mut process = start(&socket, if device.is_empty() { &image } else { device });
    // The back-end has started before its front-end listens.
    let listener = UnixListener::bind(&socket).unwrap();
    for _ in 0..3 {
        answers(&accepted(&listener));
    }
    // One front-end ends, and another one listens at the same path.
    drop(listener);
    std::fs::remove_file(&socket).unwrap();
    let listener = UnixListener::bind(&socket).unwrap();
    let connected = accepted(&listener);
    answers(&connected);
    ends_at_sigterm(&mut process.child);
    drop((connected, listener));
    // SIGTERM also ends a back-end whose front-end does not listen.
    ends_at_sigterm(&mut start(&folder.path().join("nobody"), &["net", "--loopback"]).child);
}

#[test]
fn a_socket_path_that_is_too_long_is_refused_immediately() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x".repeat(108));
    let output = Process::command_of("net", &["--loopback"]).arg("--connect").arg(path).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("longer than 107 bytes"), "{said}");
}
