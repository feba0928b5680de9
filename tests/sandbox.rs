//! System calls that a confined back-end process may make, and those that end it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Output};

use nix::libc::SIGSYS;
use vhost_migrate::backend::{Sandbox, ViolationAction};
use vhost_migrate::memory::sealed_memfd;

/// Exit status of a child whose action succeeded.
const DONE: i32 = 42;

/// Executes the action `what` of a child. `folder` is its own, and `socket` is open already.
fn act(what: &str, folder: &str, socket: &UnixStream) {
    let path = |name: &str| format!("{folder}/{name}");
    match what {
        "nothing" => {}
        "run a program" => drop(Command::new("/bin/true").status()),
        "become a program" => panic!("{}", Command::new("/bin/true").exec()),
        // SAFETY: the child of the fork only ends.
        "fork" => match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => std::process::exit(DONE),
            nix::unistd::ForkResult::Parent { .. } => {}
        },
        "make a file" => drop(File::create(path("new"))),
        "open a file for writing" => drop(OpenOptions::new().write(true).open(path("file"))),
        "remove a file" => std::fs::remove_file(path("file")).unwrap(),
        "rename a file" => drop(std::fs::rename(path("file"), path("other"))),
        "make a folder" => drop(std::fs::create_dir(path("new"))),
        "change a mode" => drop(std::fs::set_permissions(path("file"), mode(0o777))),
        "connect to a UNIX socket" => drop(UnixStream::connect(path("socket"))),
        "connect to a TCP port" => drop(TcpStream::connect("127.0.0.1:1")),
        "listen on a UNIX socket" => drop(UnixListener::bind(path("new"))),
        "listen on a TCP port" => drop(TcpListener::bind("127.0.0.1:0")),
        "signal another process" => drop(nix::sys::signal::kill(nix::unistd::getppid(), None)),
        "make an io_uring" => drop(io_uring::IoUring::new(4)),
        "map memory to execute" => drop(memmap2::MmapMut::map_anon(4096).unwrap().make_exec()),
        "be a root of its own" => drop(nix::unistd::chroot("/tmp")),
        "attach a program to a socket" => {
            let accept = libc::sock_filter { code: 6, jt: 0, jf: 0, k: u32::MAX };
            let program = libc::sock_fprog { len: 1, filter: (&raw const accept).cast_mut() };
            // SAFETY: the pointer is to a complete sock_fprog, whose one instruction outlives the call.
            let attached = unsafe {
                let (at, len) = ((&raw const program).cast(), size_of_val(&program) as u32);
                libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, at, len)
            };
            assert_eq!(attached, 0);
        }
        "ask who is at the other end" => {
            let _ = nix::sys::socket::getsockopt(socket, nix::sys::socket::sockopt::PeerCredentials).unwrap();
        }
        "work" => {
            // A named thread starts another one, as a ring does when it starts.
            // Then memory, messages, time and a panic.
            let memory = sealed_memfd("sandbox", 1 << 20).unwrap();
            let spawn = || std::thread::Builder::new().name("ring".into()).spawn(|| vec![1u8; 1 << 24].len());
            assert_eq!(std::thread::spawn(move || spawn().unwrap().join().unwrap()).join().unwrap(), 1 << 24);
            memmap2::MmapOptions::new().map_raw(&memory).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(1));
            assert!(std::thread::spawn(|| panic!("on purpose")).join().is_err());
            socket.set_read_timeout(Some(std::time::Duration::from_secs(1))).unwrap();
            socket.take_error().unwrap();
            std::io::stderr().write_all(b"still here\n").unwrap();
            for refused in [File::open("/etc/passwd").map(drop), std::fs::read_dir("/").map(drop)] {
                assert_eq!(refused.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
            }
        }
        other => unreachable!("{other}"),
    }
}

fn mode(bits: u32) -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(bits)
}

/// Not a test: the process that the tests start.
#[test]
#[ignore = "it is the others' child"]
fn child() {
    let [sandbox, what, folder] = ["SANDBOX", "ACT", "FOLDER"].map(|name| std::env::var(name).unwrap());
    let (confined, (socket, _other)) = (Sandbox::default(), UnixStream::pair().unwrap());
    match sandbox.as_str() {
        "none" => {}
        "kill" => confined.install().unwrap(),
        "log" => Sandbox { on_violation: ViolationAction::Log, ..confined }.install().unwrap(),
        "unlink" => Sandbox { allow_unlink: true, ..confined }.install().unwrap(),
        "pair" => Sandbox { allow_pair: true, ..confined }.install().unwrap(),
        other => unreachable!("{other}"),
    }
    act(&what, &folder, &socket);
    std::process::exit(DONE);
}

fn run(sandbox: &str, what: &str) -> Output {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), "data").unwrap();
    let _socket = UnixListener::bind(folder.path().join("socket")).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored", "--nocapture"]);
    let variables = [("SANDBOX", sandbox), ("ACT", what), ("RUST_BACKTRACE", "1")];
    command.envs(variables).env("FOLDER", folder.path()).output().unwrap()
}

const FORBIDDEN: &[&str] = &[
    "run a program",
    "become a program",
    "fork",
    "make a file",
    "open a file for writing",
    "remove a file",
    "rename a file",
    "make a folder",
    "change a mode",
    "connect to a UNIX socket",
    "connect to a TCP port",
    "listen on a UNIX socket",
    "listen on a TCP port",
    "signal another process",
    "make an io_uring",
    "map memory to execute",
    "be a root of its own",
    "attach a program to a socket",
    "ask who is at the other end",
];

#[test]
fn forbidden_system_calls_end_the_process() {
    for what in FORBIDDEN {
        // Without the filter the same action succeeds, to the end of the child or of the program that it executed.
        let free = run("none", what);
        assert!(matches!(free.status.code(), Some(DONE | 0)), "{what}: {free:?}");
        let confined = run("kill", what);
        assert_eq!(confined.status.signal(), Some(SIGSYS), "{what}: {confined:?}");
    }
}

#[test]
fn needed_system_calls_work_and_opening_other_files_is_refused() {
    for sandbox in ["kill", "log", "unlink", "pair"] {
        let output = run(sandbox, "work");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(DONE), "{said}");
        assert!(said.contains("on purpose") && said.contains("still here"), "{said}");
    }
}

#[test]
fn unlink_and_socket_are_allowed_only_if_configured() {
    assert_eq!(run("unlink", "remove a file").status.code(), Some(DONE));
    for what in ["connect to a UNIX socket", "connect to a TCP port", "listen on a TCP port", "run a program"] {
        // The two ends of a pair connect through a SOCK_SEQPACKET socket.
        assert_eq!(run("pair", what).status.signal(), Some(SIGSYS), "{what}");
        assert_eq!(run("unlink", what).status.signal(), Some(SIGSYS), "{what}");
    }
}

#[test]
fn a_logged_violation_is_executed() {
    for what in FORBIDDEN.iter().filter(|what| **what != "become a program") {
        let output = run("log", what);
        assert_eq!(output.status.code(), Some(DONE), "{what}: {output:?}");
    }
}
