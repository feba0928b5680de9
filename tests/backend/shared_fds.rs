//! Descriptors shared with the front-end. Whatever a front-end does to the open files, the next front-end is served and
//! SIGTERM ends the process (rule F9.1).

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe, write};
use rstest::rstest;
use vhost_migrate::abi::vhost_user::{
    DEVICE_STATE_LOAD, DeviceStateTransfer, FrontendRequest as Code, ProtocolFeatures,
};
use vhost_migrate::abi::virtio::VirtioFeatures;
use zerocopy::IntoBytes;

use crate::guest::{BASIC, Guest, PACKED, Ring, SPLIT, negotiate, negotiate_with};
use crate::hostile::assert_ring_works;
use crate::raw::{DEADLINE, RawFrontend};
use crate::server::Process;

/// A back-end process with a disk of two queues.
struct BackendProcess {
    _folder: tempfile::TempDir,
    socket: PathBuf,
    process: Process,
    guest: Guest,
}

impl BackendProcess {
    fn new(more: &[&str]) -> BackendProcess {
        let (folder, socket, process) = Process::disk(&[&["--queues", "2"], more].concat());
        BackendProcess { _folder: folder, socket, process, guest: Guest::new() }
    }

    fn interface() -> BackendProcess {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let process = Process::net(&socket, &["--loopback"]);
        BackendProcess { _folder: folder, socket, process, guest: Guest::new() }
    }

    fn begin(&self, features: VirtioFeatures) -> RawFrontend {
        let client = RawFrontend::connect(&self.socket);
        negotiate(&client, &self.guest, features);
        client
    }

    fn ring(&self, client: &RawFrontend, index: u32, features: VirtioFeatures) -> Ring {
        Ring::started(client, &self.guest, index, 256, features)
    }

    /// Closes the connection of the front-end. Asserts that the next one is served and that SIGTERM ends the process.
    fn assert_serves_next_front_end(mut self, client: RawFrontend) {
        drop(client);
        let client = self.begin(SPLIT);
        let mut ring = self.ring(&client, 1, SPLIT);
        assert_ring_works(&self.guest, &mut ring);
        self.assert_ends(true);
    }

    fn assert_ends(&mut self, in_good_order: bool) {
        self.terminate();
        let end = Instant::now() + DEADLINE;
        loop {
            match self.process.child.try_wait().unwrap() {
                Some(status) => return assert_eq!(status.success(), in_good_order, "{status}"),
                None => assert!(Instant::now() < end, "SIGTERM does not end it"),
            }
            std::thread::yield_now();
        }
    }

    fn terminate(&self) {
        kill(Pid::from_raw(self.process.child.id() as i32), Signal::SIGTERM).unwrap();
    }
}

fn set_blocking(fd: BorrowedFd<'_>, blocking: bool) {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap());
    let flags = if blocking { flags - OFlag::O_NONBLOCK } else { flags | OFlag::O_NONBLOCK };
    fcntl(fd, FcntlArg::F_SETFL(flags)).unwrap();
}

/// The kind of a descriptor that receives signals.
#[derive(Debug, Clone, Copy)]
enum SignalFd {
    EventFd,
    Socket,
    Pipe,
}

impl SignalFd {
    fn open(self) -> (OwnedFd, Option<OwnedFd>) {
        let (theirs, ours) = match self {
            SignalFd::EventFd => (EventFd::new().unwrap().into(), None),
            SignalFd::Socket => UnixStream::pair().map(|(theirs, ours)| (theirs.into(), Some(ours.into()))).unwrap(),
            SignalFd::Pipe => pipe().map(|(ours, theirs)| (theirs, Some(ours))).unwrap(),
        };
        set_blocking(theirs.as_fd(), false);
        (theirs, ours)
    }
}

/// Fills a descriptor, and clears O_NONBLOCK, so that a write would block.
fn fill(fd: BorrowedFd<'_>) {
    while write(fd, (u64::MAX - 1).as_bytes()).is_ok() {}
    while write(fd, &[0]).is_ok() {}
    set_blocking(fd, true);
}

/// Rules F8.2 and F9.1.
#[rstest]
fn a_full_blocking_call_fd_stops_no_ring(
    #[values(SignalFd::EventFd, SignalFd::Socket, SignalFd::Pipe)] kind: SignalFd,
    #[values(SPLIT, PACKED)] features: VirtioFeatures,
) {
    let backend = BackendProcess::new(&[]);
    let client = backend.begin(features);
    let mut ring = backend.ring(&client, 0, features);
    let (call, _other) = kind.open();
    client.send_acknowledged(Code::SET_VRING_CALL, &0u64, &[call.as_fd()]);
    fill(call.as_fd());
    for _ in 0..3 {
        ring.read(&backend.guest, 0, 1, 512);
        ring.kick();
        let end = Instant::now() + DEADLINE;
        while ring.driver.pop_used().unwrap().is_none() {
            assert!(Instant::now() < end, "the ring waits for room");
            std::thread::yield_now();
        }
    }
    client.ring_base(0);
    backend.assert_serves_next_front_end(client);
}

#[rstest]
fn a_full_blocking_error_fd_stops_no_ring(
    #[values(SignalFd::EventFd, SignalFd::Socket, SignalFd::Pipe)] kind: SignalFd,
) {
    let backend = BackendProcess::new(&[]);
    let client = backend.begin(SPLIT);
    let (error, _other) = kind.open();
    client.send_acknowledged(Code::SET_VRING_ERR, &0u64, &[error.as_fd()]);
    fill(error.as_fd());
    let ring = Ring::new(&backend.guest, 0, 256, SPLIT);
    // An avail index that is too far ahead.
    backend.guest.memory.write(ring.layout.avail, [0u16, 9999].as_bytes()).unwrap();
    ring.start(&client, &backend.guest);
    client.ring_base(0);
    backend.assert_serves_next_front_end(client);
}

/// A kick that poll reports as readable, and that cannot be read, or not before the other 7 bytes are sent.
/// Rule F9.3.
#[rstest]
fn a_kick_fd_that_is_no_eventfd_is_refused(#[values("socket", "pipe", "file", "epoll")] what: &str) {
    let backend = BackendProcess::new(&[]);
    let client = backend.begin(SPLIT);
    let mut ring = backend.ring(&client, 0, SPLIT);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (output, input) = pipe().unwrap();
    let low = 8;
    // SAFETY: the pointer is to an int, which is only read.
    let set = unsafe {
        let at = (&raw const low).cast();
        libc::setsockopt(theirs.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, at, size_of_val(&low) as u32)
    };
    assert_eq!(set, 0);
    (&ours).write_all(&[1]).unwrap();
    write(&input, &[1]).unwrap();
    let file = tempfile::tempfile().unwrap();
    let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap();
    let kick = match what {
        "socket" => theirs.as_fd(),
        "pipe" => output.as_fd(),
        "file" => file.as_fd(),
        _ => epoll.0.as_fd(),
    };
    assert_ne!(client.acknowledged(Code::SET_VRING_KICK, 0u64.as_bytes(), &[kick]), 0, "a {what} was taken");
    // The refused request changes nothing.
    assert_ring_works(&backend.guest, &mut ring);
    backend.assert_serves_next_front_end(client);
}

/// Rule F9.4.
#[rstest]
fn one_blocking_kick_eventfd_serves_two_rings(#[values(SPLIT, PACKED)] features: VirtioFeatures) {
    let backend = BackendProcess::new(&[]);
    let client = backend.begin(features);
    let kick = EventFd::from_flags(EfdFlags::empty()).unwrap();
    let mut rings = [0, 1].map(|index| backend.ring(&client, index, features));
    for index in [0u64, 1] {
        client.send_acknowledged(Code::SET_VRING_KICK, &index, &[kick.as_fd()]);
    }
    for round in 0..2000 {
        for ring in &mut rings {
            ring.read(&backend.guest, 0, 1, 512);
            // The kick below is sent even if the device does not want it: one of the rings has no other wake-up.
            let _ = ring.driver.publish();
            // Both rings use the same addresses for their requests.
            if round % 2 == 0 {
                kick.write(1).unwrap();
                ring.completion();
            }
        }
        if round % 2 == 1 {
            kick.write(1).unwrap();
            rings.iter_mut().for_each(|ring| _ = ring.completion());
        }
    }
    backend.assert_serves_next_front_end(client);
}

/// A back-end that has read the first bytes waits for the next ones without blocking anything else.
/// Rule F9.1.
#[rstest]
fn an_incomplete_device_state_transfer_blocks_no_other_front_end(#[values("pipe", "socket")] kind: &str) {
    let mut backend = BackendProcess::interface();
    let client = RawFrontend::connect(&backend.socket);
    negotiate_with(&client, &backend.guest, BASIC, ProtocolFeatures::REPLY_ACK | ProtocolFeatures::DEVICE_STATE);
    let (theirs, ours): (OwnedFd, OwnedFd) = match kind {
        "pipe" => pipe().unwrap(),
        _ => UnixStream::pair().map(|(theirs, ours)| (theirs.into(), ours.into())).unwrap(),
    };
    let transfer = DeviceStateTransfer { direction: DEVICE_STATE_LOAD, phase: 0 };
    let answer = client.request_with_fds(Code::SET_DEVICE_STATE_FD, transfer.as_bytes(), &[theirs.as_fd()]);
    assert_eq!(answer, 0x100u64.to_le_bytes());
    for _ in 0..3 {
        write(&ours, &[1]).unwrap();
        let end = Instant::now() + DEADLINE;
        while unread(theirs.as_fd()) > 0 {
            assert!(Instant::now() < end, "nobody reads it");
            std::thread::yield_now();
        }
        set_blocking(theirs.as_fd(), true);
    }
    drop(client);
    backend.begin(BASIC).wait_until_processed();
    backend.assert_ends(true);
}

fn unread(fd: BorrowedFd<'_>) -> i32 {
    let mut count = 0;
    // SAFETY: the pointer is to an int for the result.
    assert_eq!(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONREAD, &raw mut count) }, 0);
    count
}

/// A thread cannot continue for any reason, here because ptrace holds it.
#[test]
fn sigterm_ends_a_process_with_a_hanging_thread() {
    let mut backend = BackendProcess::new(&["--stop-timeout", "1"]);
    let client = backend.begin(SPLIT);
    let mut ring = backend.ring(&client, 0, SPLIT);
    assert_ring_works(&backend.guest, &mut ring);
    let tasks = std::fs::read_dir(format!("/proc/{}/task", backend.process.child.id())).unwrap();
    let thread = tasks.map(|task| task.unwrap().path()).find(|task| {
        let name = std::fs::read_to_string(task.join("comm"));
        name.is_ok_and(|name| name.trim() == "ring 0")
    });
    let id: i32 = thread.unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap();
    // SAFETY: these requests use no pointers.
    let held = [libc::PTRACE_SEIZE, libc::PTRACE_INTERRUPT].map(|request| unsafe { libc::ptrace(request, id, 0, 0) });
    assert_eq!(held, [0, 0], "{}", std::io::Error::last_os_error());
    let wait = || {
        let mut status = 0;
        // SAFETY: a thread id, and a pointer to an int for the result.
        assert_eq!(unsafe { libc::waitpid(id, &raw mut status, libc::__WALL) }, id);
        status
    };
    assert!(libc::WIFSTOPPED(wait()));
    backend.terminate();
    // This process traces the thread. It receives the end of the thread before the back-end process can be gone.
    let (sender, over) = std::sync::mpsc::channel();
    let pid = backend.process.child.id() as i32;
    std::thread::spawn(move || {
        if over.recv_timeout(DEADLINE).is_err() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
    });
    assert_eq!(libc::WEXITSTATUS(wait()), 1);
    sender.send(()).unwrap();
    assert_eq!(backend.process.child.wait().unwrap().code(), Some(1));
}
