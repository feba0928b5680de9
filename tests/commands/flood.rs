//! A back-end that floods its front-end with calls, errors, messages on the back-end channel, refusals and unrequested
//! replies. The guest's process logs little, leaks no descriptors, and continues as soon as the back-end behaves.

use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vhost_migrate::abi::vhost_user::{BackendRequest, FrontendRequest, Header, VringState};
use zerocopy::IntoBytes;

use super::message::{has_reply, pass_on, receive};
use super::{ChildProcess, Host, PATIENCE, program, status, verify, wait_for_state};

/// Misbehaviour of the back-end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Flood {
    Nothing,
    /// Unrequested calls, errors and messages; the size of the disk changes with every read.
    Events,
    /// Every request with a reply is refused, with a different code each time.
    Refusals,
    /// Replies without a request.
    Answers,
}

const FLOODS: [Flood; 4] = [Flood::Nothing, Flood::Events, Flood::Refusals, Flood::Answers];

/// A proxy between a front-end and its back-end.
struct FloodingProxy {
    socket: PathBuf,
    shared: Arc<FloodState>,
}

#[derive(Default)]
struct FloodState {
    /// Index in `FLOODS`.
    flood: AtomicU64,
    /// Number of events, refusals and replies so far.
    sent: AtomicU64,
}

impl FloodState {
    fn flood(&self) -> Flood {
        FLOODS[self.flood.load(Ordering::Relaxed) as usize]
    }

    fn count(&self) -> u64 {
        self.sent.fetch_add(1, Ordering::Relaxed)
    }
}

impl FloodingProxy {
    fn start(folder: &Path, backend: &Path) -> FloodingProxy {
        let (socket, shared) = (folder.join("flooder"), Arc::new(FloodState::default()));
        let listener = UnixListener::bind(&socket).unwrap();
        let (backend, seen) = (backend.to_owned(), shared.clone());
        std::thread::spawn(move || {
            for frontend in listener.incoming() {
                if let Ok(backend) = UnixStream::connect(&backend) {
                    let session = ProxySession { frontend: frontend.unwrap(), backend, shared: &seen, fds: Vec::new() };
                    let _ = session.serve();
                }
            }
        });
        FloodingProxy { socket, shared }
    }

    /// Floods the front-end `times` times. Returns the duration.
    fn flood(&self, flood: Flood, times: u64) -> Duration {
        let (begun, goal) = (Instant::now(), self.shared.sent.load(Ordering::Relaxed) + times);
        self.set(flood);
        while self.shared.sent.load(Ordering::Relaxed) < goal {
            assert!(
                begun.elapsed() < 2 * PATIENCE,
                "{flood:?}: {} of {goal}",
                self.shared.sent.load(Ordering::Relaxed)
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        begun.elapsed()
    }

    /// Applies to new connections.
    fn set(&self, flood: Flood) {
        let place = FLOODS.iter().position(|other| *other == flood).unwrap();
        self.shared.flood.store(place as u64, Ordering::Relaxed);
    }
}

struct ProxySession<'a> {
    frontend: UnixStream,
    backend: UnixStream,
    shared: &'a FloodState,
    /// Descriptors for signals to the front-end.
    fds: Vec<(FrontendRequest, OwnedFd)>,
}

impl ProxySession<'_> {
    /// Runs until one side disconnects, or the mode has changed.
    fn serve(mut self) -> Option<()> {
        let begun_as = self.shared.flood();
        loop {
            match self.shared.flood() {
                // Events are sent on an established connection.
                Flood::Events if begun_as == Flood::Nothing => self.events(),
                Flood::Answers => self.answer_unasked()?,
                now if now == begun_as => {}
                _ => return None,
            }
            let mut fds = [
                PollFd::new(self.frontend.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.backend.as_fd(), PollFlags::empty()),
            ];
            poll(&mut fds, 1u8).ok()?;
            match fds.map(|fd| fd.any().unwrap_or(true)) {
                [_, true] => return None,
                [true, _] => self.pass()?,
                _ => {}
            }
        }
    }

    /// Relays a message and its reply.
    fn pass(&mut self) -> Option<()> {
        let message = receive(&self.frontend)?;
        let request = FrontendRequest(message.header.request);
        let signals =
            [FrontendRequest::SET_VRING_CALL, FrontendRequest::SET_VRING_ERR, FrontendRequest::SET_BACKEND_REQ_FD];
        if let (true, Some(fd)) = (signals.contains(&request), message.fds.first()) {
            // SAFETY: the descriptor came with the message, and is closed when that is relayed.
            let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
            self.fds.push((request, fd.try_clone_to_owned().ok()?));
        }
        pass_on(&self.backend, &message)?;
        if !has_reply(&message.header) {
            return Some(());
        }
        let mut reply = receive(&self.backend)?;
        let flood = self.shared.flood();
        let is_ack = message.header.flags & Header::FLAG_NEED_REPLY != 0;
        if flood == Flood::Refusals && is_ack {
            reply.payload = (1 + self.shared.count()).as_bytes().to_vec();
        }
        if flood == Flood::Events && request == FrontendRequest::GET_CONFIG {
            // The capacity follows the message's own header.
            let capacity = (1 + self.shared.count()).as_bytes().to_vec();
            reply.payload.splice(12..20, capacity);
        }
        pass_on(&self.frontend, &reply)
    }

    /// Sends every kind of back-end message, once or as often as the socket accepts.
    fn events(&mut self) {
        let file = std::fs::File::open("/dev/zero").unwrap();
        for (request, fd) in &self.fds {
            if *request != FrontendRequest::SET_BACKEND_REQ_FD {
                let _ = nix::unistd::write(fd, &1u64.to_ne_bytes());
                self.shared.count();
                continue;
            }
            for round in 0..16 {
                let number = self.shared.count() as u32;
                let codes = [
                    BackendRequest::CONFIG_CHANGE_MSG,
                    BackendRequest::VRING_ERR,
                    BackendRequest::VRING_CALL,
                    BackendRequest::VRING_HOST_NOTIFIER_MSG,
                    BackendRequest(1000 + number),
                ];
                for code in codes {
                    let flags = Header::FLAG_VERSION | if round % 2 == 0 { Header::FLAG_NEED_REPLY } else { 0 };
                    let ring = VringState { index: number % 4, num: 0 };
                    let header = Header { request: code.0, flags, size: size_of_val(&ring) as u32 };
                    let bytes = [header.as_bytes(), ring.as_bytes()].concat();
                    let rights = [file.as_raw_fd()];
                    let control = [ControlMessage::ScmRights(&rights)];
                    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                    let _ = sendmsg::<()>(fd.as_raw_fd(), &[IoSlice::new(&bytes)], &control, flags, None);
                }
            }
            // Reads the replies, so that more messages can be sent.
            let flags = MsgFlags::MSG_DONTWAIT;
            while nix::sys::socket::recv(fd.as_raw_fd(), &mut [0; 4096], flags).is_ok_and(|count| count > 0) {}
        }
    }

    /// Sends a reply without a request.
    fn answer_unasked(&mut self) -> Option<()> {
        let request = self.shared.count() as u32 % 40;
        let header = Header { request, flags: Header::REPLY_FLAGS, size: 8 };
        let bytes = [header.as_bytes(), &[0; 8]].concat();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match nix::sys::socket::send(self.frontend.as_raw_fd(), &bytes, flags) {
            Ok(_) | Err(nix::Error::EAGAIN) => Some(()),
            Err(_) => None,
        }
    }
}

fn fds(process: &ChildProcess) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", process.0.id())).unwrap().count()
}

#[test]
fn a_flooding_back_end_does_not_exhaust_log_or_fds_of_the_guest_process() {
    let mut host = Host::new();
    let backend = host.backend("honest.vhost");
    let flooder = FloodingProxy::start(host.folder.path(), &backend);
    let (control, log) = (host.path("control"), host.path("log"));
    let mut command = program();
    command.args(["guest", "--memory", "64MiB", "--dirty-rate", "8MiB/s", "--request-rate", "50", "--backend"]);
    command.arg(&flooder.socket).arg("--control").arg(&control).env("RUST_LOG", "info").stdout(Stdio::null());
    let guest = ChildProcess(command.stderr(std::fs::File::create(&log).unwrap()).spawn().unwrap());
    wait_for_state(&control, "running");
    let before = fds(&guest);

    let mut took = Duration::ZERO;
    for (flood, times) in [(Flood::Events, 20_000), (Flood::Refusals, 20), (Flood::Answers, 200)] {
        took += flooder.flood(flood, times);
        // The process replies, and its guest has not failed.
        let seen = status(&control).unwrap();
        assert_eq!(
            (&seen["state"], &seen["failure"]),
            (&"running".into(), &serde_json::Value::Null),
            "{flood:?}: {seen}"
        );
    }
    flooder.set(Flood::Nothing);
    let deadline = Instant::now() + PATIENCE;
    while !status(&control).unwrap()["devices"][0]["away_ms"].is_null() || fds(&guest) > before {
        assert!(Instant::now() < deadline, "{} fds, {before} before: {}", fds(&guest), status(&control).unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }
    verify(&control);

    let mut lines = String::new();
    std::fs::File::open(&log).unwrap().read_to_string(&mut lines).unwrap();
    let most = 100 * (1 + took.as_secs() as usize / 10);
    assert!(lines.lines().count() < most, "{} lines in {took:?}:\n{lines}", lines.lines().count());
    assert!(!lines.contains("ERROR"), "{lines}");
}
