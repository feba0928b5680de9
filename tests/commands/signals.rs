//! SIGTERM ends every command soon, also while it waits for peers that are stopped or never reply.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use rstest::rstest;
use serde_json::json;

use super::{
    ChildProcess, Host, PATIENCE, migrating, program, send_command, signal, verify, wait_for, wait_for_state,
    wait_until, wait_until_listening,
};

/// Long enough for a busy machine, and shorter than any time limit for a peer.
const END_TIMEOUT: Duration = Duration::from_secs(8);

/// Sends SIGTERM and asserts that the process ends soon.
fn assert_ends_by_sigterm(process: &mut ChildProcess, what: &str) -> ExitStatus {
    signal(process, Signal::SIGTERM);
    wait_for_end(process, what, END_TIMEOUT)
}

fn wait_for_end(process: &mut ChildProcess, what: &str, limit: Duration) -> ExitStatus {
    let begun = Instant::now();
    loop {
        if let Some(status) = process.0.try_wait().unwrap() {
            return status;
        }
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn start(arguments: &[&str]) -> ChildProcess {
    let mut command = program();
    ChildProcess(command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

/// Gives the command time to reach its wait; the result must not depend on it.
fn wait_for_blocked_command() {
    std::thread::sleep(Duration::from_millis(300));
}

fn stop(process: &ChildProcess) {
    signal(process, Signal::SIGSTOP);
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Like a back-end that accepts a connection and never replies: the connection stays in the backlog.
fn silent_socket(host: &Host) -> (UnixListener, String) {
    let path = host.path("silent");
    let listener = UnixListener::bind(&path).unwrap();
    (listener, text(&path).into())
}

#[rstest]
#[case::boots(&["guest", "--control", "CONTROL", "--backend", "PEER", "--memory", "64MiB"])]
#[case::checks(&["check", "PEER"])]
#[case::measures(&["dirty-rate", "--control", "PEER"])]
#[case::migrates(&["migrate", "--control", "PEER", "unix:x"])]
#[case::resumes(&["resume", "--control", "PEER"])]
#[case::forgets(&["forget", "--control", "PEER"])]
fn sigterm_ends_a_command_whose_peer_never_replies(#[case] arguments: &[&str]) {
    let host = Host::new();
    let (_listener, peer) = silent_socket(&host);
    let control = host.path("control");
    let words: Vec<&str> = arguments
        .iter()
        .map(|word| match *word {
            "PEER" => peer.as_str(),
            "CONTROL" => text(&control),
            other => other,
        })
        .collect();
    let mut process = start(&words);
    wait_for_blocked_command();
    assert!(process.0.try_wait().unwrap().is_none(), "{arguments:?} does not wait");
    assert_ends_by_sigterm(&mut process, arguments[0]);
}

#[test]
fn sigterm_ends_inspect_on_a_pipe_without_a_writer() {
    let host = Host::new();
    let pipe = host.path("pipe");
    nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    let mut process = start(&["inspect", "stream", text(&pipe)]);
    wait_for_blocked_command();
    assert_eq!(assert_ends_by_sigterm(&mut process, "inspect").signal(), Some(Signal::SIGTERM as i32));
}

#[test]
fn sigterm_ends_a_guest_whose_back_end_hangs() {
    let mut host = Host::new();
    host.source();
    let [backend, guest] = &mut host.running[..] else { panic!() };
    stop(backend);
    wait_for_blocked_command();
    assert_ends_by_sigterm(guest, "guest");
    signal(backend, Signal::SIGCONT);
}

/// First the source has sent half of its header, then the back-end hangs when the guest arrives.
#[test]
fn sigterm_ends_a_destination_that_waits_for_a_source_or_a_back_end() {
    let mut host = Host::new();
    let unix = host.unix("incoming");
    let destination = host.waiting("destination", &unix);
    wait_until_listening(&destination);
    let mut half = UnixStream::connect(host.path("incoming")).unwrap();
    half.write_all(b"VH").unwrap();
    wait_for_blocked_command();
    assert_ends_by_sigterm(host.running.last_mut().unwrap(), "guest --incoming");

    host.waiting("another", &unix);
    let [.., backend, _] = &host.running[..] else { panic!() };
    stop(backend);
    let (at, stopped) = (host.running.len() - 1, Pid::from_raw(backend.0.id() as i32));
    let source = host.source();
    let _migration = start(&["migrate", &unix, "--control", text(&source)]);
    wait_for_blocked_command();
    assert_ends_by_sigterm(&mut host.running[at], "guest --incoming");
    kill(stopped, Signal::SIGCONT).unwrap();
}

/// A hanging front-end does not keep the back-end from ending.
#[test]
fn sigterm_ends_a_back_end_whose_front_end_hangs() {
    let mut host = Host::new();
    host.source();
    let [backend, guest] = &mut host.running[..] else { panic!() };
    stop(guest);
    assert_eq!(assert_ends_by_sigterm(backend, "backend").code(), Some(0));
    signal(guest, Signal::SIGCONT);
}

#[rstest]
#[case::disk(&["blk", "--image", "DISK"])]
#[case::interface(&["net", "--loopback"])]
fn sigterm_ends_a_back_end_that_waits_for_the_rest_of_a_message(#[case] device: &[&str]) {
    let host = Host::new();
    let (disk, socket) = (host.path("disk"), host.path("socket"));
    let device = device.iter().map(|word| if *word == "DISK" { text(&disk) } else { word });
    let words: Vec<&str> = ["backend"].into_iter().chain(device).collect();
    let mut process = start(&[&words[..], &["--socket", text(&socket)]].concat());
    let mut half = wait_for("the back-end listens", || UnixStream::connect(&socket).ok());
    half.write_all(&[1, 0, 0]).unwrap();
    wait_for_blocked_command();
    assert_eq!(assert_ends_by_sigterm(&mut process, "backend").code(), Some(0));

    // The connection is never accepted.
    let (listener, peer) = silent_socket(&host);
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let _filler = UnixStream::connect(&peer).unwrap();
    let mut command = program();
    command.args(&words).args(["--connect", &peer]).stdout(Stdio::piped());
    let mut process = ChildProcess(command.spawn().unwrap());
    // After this output it handles signals.
    BufReader::new(process.0.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    wait_for_blocked_command();
    assert_eq!(assert_ends_by_sigterm(&mut process, "backend --connect").code(), Some(0));
}

/// Logging cannot be stopped while the back-end hangs.
#[test]
fn sigterm_ends_a_migration_whose_back_end_hangs_and_the_guest_keeps_running() {
    let mut host = Host::new();
    let (source, _, unix) = host.pair();
    let (mut migration, mut events) = migrating(&source, &unix);
    events.find(|event| ["progress", "round"].contains(&event["event"].as_str().unwrap())).unwrap();
    stop(&host.running[0]);
    assert_eq!(assert_ends_by_sigterm(&mut migration, "migrate").code(), Some(1));
    signal(&host.running[0], Signal::SIGCONT);
    verify(&source);
}

/// Worst case: the guest's process has accepted the cancellation and then hangs.
#[test]
fn sigterm_ends_a_migration_whose_guest_process_hangs_after_cancel() {
    let host = Host::new();
    let (listener, peer) = silent_socket(&host);
    let mut process = start(&["migrate", "--control", &peer, "unix:x"]);
    let (_migrates, _) = listener.accept().unwrap();
    signal(&process, Signal::SIGTERM);
    let (mut cancels, _) = listener.accept().unwrap();
    cancels.write_all(b"{\"event\":\"ok\"}\n").unwrap();
    assert_eq!(wait_for_end(&mut process, "migrate", END_TIMEOUT).code(), Some(5));
}

#[test]
fn sigterm_ends_a_demo_and_its_hanging_processes() {
    let _host = Host::new(); // one at a time
    let mut demo = start(&["demo", "--memory", "64MiB", "--seconds", "1000"]);
    let children = || -> Vec<i32> {
        let list = format!("/proc/{0}/task/{0}/children", demo.0.id());
        let text = std::fs::read_to_string(list).unwrap();
        text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
    };
    wait_until("two back-ends and two guests", || children().len() >= 4);
    wait_for_blocked_command();
    let children = children();
    children.iter().for_each(|pid| kill(Pid::from_raw(*pid), Signal::SIGSTOP).unwrap());
    assert_eq!(assert_ends_by_sigterm(&mut demo, "demo").code(), Some(1));
    for pid in children {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "it has left {pid} behind");
    }
}

/// A script that starts a back-end on the host's disk and records its pid.
struct Restarts {
    command: String,
    pids: PathBuf,
}

impl Restarts {
    /// `before` runs before the back-end is started.
    fn new(host: &Host, socket: &Path, before: &str) -> Restarts {
        let (script, pids) = (host.path("restart"), host.path("pids"));
        let backend = format!("{} backend blk", env!("CARGO_BIN_EXE_vhost-migrate"));
        let (disk, list, socket) = (host.path("disk"), pids.display(), socket.display());
        let backend = format!("exec {backend} --image {} --socket {socket}", disk.display());
        std::fs::write(&script, format!("echo $$ >> {list}\n{before}\n{backend}\n")).unwrap();
        Restarts { command: format!("sh {}", script.display()), pids }
    }

    fn pids(&self) -> Vec<i32> {
        let text = std::fs::read_to_string(&self.pids).unwrap_or_default();
        text.lines().map(|pid| pid.parse().unwrap()).collect()
    }

    /// Ends running back-ends. Returns their number.
    fn end(&self) -> usize {
        self.pids().into_iter().filter(|pid| kill(Pid::from_raw(*pid), Signal::SIGKILL).is_ok()).count()
    }
}

/// Starts `check --write --restart` in its own process group.
fn writes(host: &Host, socket: &Path, restarts: &Restarts) -> ChildProcess {
    let mut command = program();
    command.args(["check", "--write", "--only", "I9", "--timeout", "600", "--restart", &restarts.command]).arg(socket);
    command.env("TMPDIR", host.path("")).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    ChildProcess(command.spawn().unwrap())
}

/// Fills the disk of the host, so that writes can be detected.
fn fill(host: &Host) -> Vec<u8> {
    let bytes: Vec<u8> = (0..16 << 20u32).map(|at: u32| (at / 512 % 251) as u8).collect();
    std::fs::write(host.path("disk"), &bytes).unwrap();
    bytes
}

#[rstest]
#[case::sigterm(Signal::SIGTERM, false)]
#[case::sigint_from_the_terminal(Signal::SIGINT, true)]
#[case::terminal_hangup(Signal::SIGHUP, true)]
fn sigterm_makes_check_restore_the_disk_and_end_its_back_end(#[case] signal: Signal, #[case] whole_group: bool) {
    let host = Host::new();
    let socket = host.path("socket");
    let before = fill(&host);
    let disk = || std::fs::read(host.path("disk")).unwrap();
    let deadline = Instant::now() + 2 * PATIENCE;
    // Repeated until the signal arrives before the check has restored the disk by itself.
    loop {
        let restarts = Restarts::new(&host, &socket, "");
        let mut check = writes(&host, &socket, &restarts);
        while disk() == before && check.0.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "it writes nothing");
        }
        let pid = check.0.id() as i32;
        kill(Pid::from_raw(if whole_group { -pid } else { pid }), signal).unwrap();
        let status = wait_for_end(&mut check, "check", PATIENCE);
        let left = restarts.end();
        assert!(disk() == before, "{status}: its bytes are on the disk");
        assert_eq!(left, 0, "{status}: its back-end runs on");
        if status.signal() == Some(signal as i32) {
            break;
        }
        assert!(Instant::now() < deadline, "it always ends before: {status}");
    }
}

/// The back-end was killed with writes on the disk, and its successor does not start.
#[test]
fn sigterm_makes_check_print_disk_contents_that_it_cannot_restore() {
    let host = Host::new();
    let socket = host.path("socket");
    let before = fill(&host);
    let once = host.path("once");
    let restarts = Restarts::new(&host, &socket, &format!("mkdir {} || exec sleep 1000", once.display()));
    let mut check = writes(&host, &socket, &restarts);
    let deadline = Instant::now() + PATIENCE;
    while restarts.pids().len() < 2 {
        assert!(Instant::now() < deadline && check.0.try_wait().unwrap().is_none(), "it was not killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    signal(&check, Signal::SIGTERM);
    let (status, left, mut told) = (wait_for_end(&mut check, "check", PATIENCE), restarts.end(), String::new());
    check.0.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    assert_eq!(status.signal(), Some(Signal::SIGTERM as i32), "{told}");
    assert_eq!(left, 0, "what it has started runs on");
    // Of 32768 sectors, 20 parts of 102.
    let (_, told) =
        told.split_once("the check was stopped; sectors 30728 to 32767 of the disk were not restored").unwrap();
    let (_, kept) = told.trim_end().rsplit_once("their old contents are in ").unwrap();
    assert!(std::fs::read(kept).unwrap() == before[30728 * 512..], "{kept}");
}

#[test]
fn guest_and_back_end_remove_their_sockets_however_they_end() {
    let mut host = Host::new();
    let [guest, incoming, disk] = ["guest", "incoming", "disk"].map(|name| host.path(&format!("{name}.sock")));
    let [of_guest, of_disk] = [&guest, &disk].map(|path| format!("unix:{}.metrics", path.display()));
    let backend = host.backend_with("disk.sock", &["--metrics", &of_disk]);
    for quits in [false, true] {
        let (control, unix) = (host.path("guest.control"), format!("unix:{}", incoming.display()));
        host.guest_on(&backend, "guest", &["--incoming", &unix, "--metrics", &of_guest]);
        wait_for_state(&control, "absent");
        wait_until_listening(&control);
        let sockets = [control.clone(), incoming.clone(), of_guest["unix:".len()..].into()];
        sockets.iter().for_each(|path| assert!(path.exists(), "{}", path.display()));
        let mut process = host.running.pop().unwrap();
        if quits {
            assert_eq!(send_command(&control, &json!({"command": "quit"})).unwrap(), [json!({"event": "ok"})]);
            process.0.wait().unwrap();
        } else {
            assert_eq!(assert_ends_by_sigterm(&mut process, "guest").signal(), Some(Signal::SIGTERM as i32));
        }
        sockets.iter().for_each(|path| assert!(!path.exists(), "{} is left behind", path.display()));
    }
    let sockets = [backend, of_disk["unix:".len()..].into()];
    sockets.iter().for_each(|path| assert!(path.exists(), "{}", path.display()));
    assert_eq!(assert_ends_by_sigterm(&mut host.running[0], "backend").code(), Some(0));
    sockets.iter().for_each(|path| assert!(!path.exists(), "{} is left behind", path.display()));
}
