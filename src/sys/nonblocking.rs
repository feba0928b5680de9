//! Reads and writes of descriptors that a peer shares. They return at once whatever the peer does (rules F9.1, F9.2).
//!
//! O_NONBLOCK is a flag of the open file, which the peer can clear at any time. A poll does not help either: the peer
//! may fill or empty the file right after it. RWF_NOWAIT and MSG_DONTWAIT apply to one call, so they are used here. A
//! write to an eventfd has no such flag. Signals that the kernel itself sends to an eventfd never block, and
//! asynchronous I/O (io_submit) sends one for every completion, so an eventfd is signalled by an empty asynchronous
//! read.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;

use libc::{c_long, c_ulong};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};

use crate::abi::linux::{IOCB_CMD_PREAD, IOCB_FLAG_RESFD, Iocb, KCMP_FILE};

/// Maximum number of completions that one io_getevents takes off the queue.
const REAP_BATCH: usize = 32;
/// Maximum number of attempts to find a free completion slot, for which other threads compete.
const MAX_SUBMIT_ATTEMPTS: usize = 1000;

/// Signals an eventfd, or sends the same 8 bytes through a socket or pipe.
///
/// A full receiver already has a signal pending, so this is not an error.
///
/// # Errors
/// The error of the system, for example if the other end of a socket is closed.
pub(crate) fn signal(fd: BorrowedFd<'_>) -> nix::Result<()> {
    if submit(fd, 0).is_ok() {
        return Ok(());
    }
    let one = 1u64.to_ne_bytes();
    let mut rest = one.as_slice();
    while !rest.is_empty() {
        match write(fd, rest) {
            // Pipes and sockets may take part of the 8 bytes; the receiver expects all of them.
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Resets the counter of an eventfd to 0 and returns its former value.
///
/// # Errors
/// `EAGAIN` if the counter is 0, otherwise the error of the system.
pub(crate) fn take(eventfd: BorrowedFd<'_>) -> nix::Result<u64> {
    let mut count = [0; 8];
    match read(eventfd, &mut count)? {
        8 => Ok(u64::from_ne_bytes(count)),
        _ => Err(Errno::EPIPE),
    }
}

/// Reads the available bytes, at most `buffer.len()`. Returns 0 at the end of the stream.
///
/// # Errors
/// `EAGAIN` if no bytes are available, otherwise the error of the system.
pub(crate) fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<usize> {
    let iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the one iovec describes `buffer`, which is alive and exclusively borrowed across the call.
    let read = |flags| unsafe { libc::preadv2(fd.as_raw_fd(), &raw const iov, 1, -1, flags) };
    match Errno::result(read(libc::RWF_NOWAIT)) {
        Err(Errno::EOPNOTSUPP) => ready(fd, PollFlags::POLLIN).and_then(|()| Errno::result(read(0))),
        done => done,
    }
    .map(isize::unsigned_abs)
}

/// Writes as many of `bytes` as fit, and returns their number.
///
/// # Errors
/// `EAGAIN` if none fit, otherwise the error of the system. A socket whose peer has closed it raises no SIGPIPE.
pub(crate) fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> nix::Result<usize> {
    match send(fd.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
        Err(Errno::ENOTSOCK) => {}
        sent => return sent,
    }
    let iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: the one iovec describes `bytes`, which are alive across the call and only read by it.
    let write = |flags| unsafe { libc::pwritev2(fd.as_raw_fd(), &raw const iov, 1, -1, flags) };
    match Errno::result(write(libc::RWF_NOWAIT)) {
        Err(Errno::EOPNOTSUPP) => ready(fd, PollFlags::POLLOUT).and_then(|()| Errno::result(write(0))),
        done => done,
    }
    .map(isize::unsigned_abs)
}

/// Returns true for an eventfd.
pub(crate) fn is_eventfd(fd: BorrowedFd<'_>) -> bool {
    // The kernel checks that the descriptor is an eventfd before it checks the flags, of which these are invalid: an
    // eventfd gives EOPNOTSUPP and is not signalled.
    match submit(fd, u32::MAX) {
        Err(Errno::EOPNOTSUPP) => true,
        Ok(()) | Err(Errno::EINVAL | Errno::EBADF) => false,
        // Without asynchronous I/O, the file type decides: anonymous inodes, which eventfds are, have none.
        Err(_) => kind(fd).is_ok_and(|kind| kind.is_empty()),
    }
}

/// Returns true if two descriptors refer to one open file. Returns false also if the system does not tell.
pub(crate) fn is_same_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    let process = std::process::id();
    // SAFETY: takes five numbers, and changes nothing.
    let order =
        unsafe { libc::syscall(libc::SYS_kcmp, process, process, KCMP_FILE, one.as_raw_fd(), other.as_raw_fd()) };
    order == 0
}

/// Returns true for pipes, sockets and character devices. Files of a file system are excluded: poll always reports them
/// ready.
pub(crate) fn is_stream(fd: BorrowedFd<'_>) -> bool {
    kind(fd).is_ok_and(|kind| [SFlag::S_IFIFO, SFlag::S_IFSOCK, SFlag::S_IFCHR].contains(&kind))
}

/// Creates the context for signals now. Call it before a sandbox forbids io_setup.
pub(crate) fn prepare() {
    context();
}

fn kind(fd: BorrowedFd<'_>) -> nix::Result<SFlag> {
    Ok(SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT)
}

/// Polls `fd` for `flags` before a call without RWF_NOWAIT, for files that do not support that flag: pipes before
/// Linux 6.4, and eventfds where io_submit does not work.
///
/// # Errors
/// `EAGAIN` if the file is not ready, `EOPNOTSUPP` for other files.
fn ready(fd: BorrowedFd<'_>, flags: PollFlags) -> nix::Result<()> {
    if !kind(fd).is_ok_and(|kind| kind.is_empty() || kind == SFlag::S_IFIFO) {
        return Err(Errno::EOPNOTSUPP);
    }
    match poll(&mut [PollFd::new(fd, flags)], PollTimeout::ZERO)? {
        0 => Err(Errno::EAGAIN),
        _ => Ok(()),
    }
}

/// Submits a read of 0 bytes, which completes at once and thereby signals `eventfd`.
///
/// # Errors
/// `EINVAL` if it is not an eventfd, `ENOSYS` if this process has no asynchronous I/O, otherwise the error of the
/// system.
fn submit(eventfd: BorrowedFd<'_>, rw_flags: u32) -> nix::Result<()> {
    let context = context().ok_or(Errno::ENOSYS)?;
    let number = eventfd.as_raw_fd() as u32;
    let (opcode, flags) = (IOCB_CMD_PREAD, IOCB_FLAG_RESFD);
    let mut request = Iocb { rw_flags, opcode, fd: number, flags, signalled: number, ..Iocb::default() };
    let mut requests = [&raw mut request];
    for _ in 0..MAX_SUBMIT_ATTEMPTS {
        // SAFETY: one pointer to a whole iocb; the buffer that it names has no bytes.
        let submitted = unsafe { libc::syscall(libc::SYS_io_submit, context, 1 as c_long, requests.as_mut_ptr()) };
        match Errno::result(submitted) {
            Err(Errno::EAGAIN) => reap(context),
            submitted => return submitted.map(drop),
        }
    }
    Err(Errno::EAGAIN)
}

/// Takes completions off the queue to make space for new ones. Their contents are not used.
fn reap(context: c_ulong) {
    let mut events = [[0u64; 4]; REAP_BATCH];
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `events` has space for REAP_BATCH io_events of 32 bytes, which the kernel fills; it only reads the
    // timespec.
    unsafe {
        libc::syscall(
            libc::SYS_io_getevents,
            context,
            0 as c_long,
            REAP_BATCH as c_long,
            events.as_mut_ptr(),
            &raw const none,
        )
    };
}

/// The asynchronous I/O context for all signals of this process; `None` if the system refuses one.
fn context() -> Option<c_ulong> {
    static CONTEXT: OnceLock<Option<c_ulong>> = OnceLock::new();
    *CONTEXT.get_or_init(|| {
        let mut context: c_ulong = 0;
        // SAFETY: the kernel writes the new context to `context`, which is 0 as io_setup requires.
        if unsafe { libc::syscall(libc::SYS_io_setup, 1 as c_long, &raw mut context) } == 0 {
            return Some(context);
        }
        let error = io::Error::last_os_error();
        tracing::warn!(
            "io_setup: {error}: a peer that fills an eventfd can block the thread of its own ring; check fs.aio-max-nr"
        );
        None
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use nix::sys::eventfd::EventFd;
    use rstest::rstest;

    use super::*;

    /// Runs `call` on another thread and panics if it blocks.
    fn returns<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, is_done) = channel();
        std::thread::spawn(move || done.send(call()));
        is_done.recv_timeout(Duration::from_secs(60)).unwrap()
    }

    fn eventfd(count: u64) -> OwnedFd {
        let eventfd = EventFd::new().unwrap();
        eventfd.write(count).unwrap();
        eventfd.into()
    }

    #[test]
    fn signals_of_an_eventfd_add_up_and_are_taken_together() {
        let blocking = EventFd::new().unwrap();
        for _ in 0..1000 {
            signal(blocking.as_fd()).unwrap();
        }
        assert_eq!(blocking.read(), Ok(1000));
        signal(blocking.as_fd()).unwrap();
        assert_eq!(take(blocking.as_fd()), Ok(1));
        assert_eq!(returns(move || take(blocking.as_fd())), Err(Errno::EAGAIN));
    }

    #[test]
    fn signalling_a_full_blocking_eventfd_returns_at_once() {
        returns(|| {
            let full = eventfd(u64::MAX - 1);
            (0..500).try_for_each(|_| signal(full.as_fd())).unwrap();
            assert_eq!(take(full.as_fd()), Ok(u64::MAX));
        });
    }

    #[rstest]
    #[case::stream(UnixStream::pair().map(|(ours, theirs)| (ours.into(), theirs.into())).unwrap())]
    #[case::pipe(nix::unistd::pipe().map(|(output, input)| (input, output)).unwrap())]
    fn a_full_or_empty_blocking_file_gives_eagain(#[case] (input, output): (OwnedFd, OwnedFd)) {
        returns(move || {
            assert_eq!(read(output.as_fd(), &mut [0; 9]), Err(Errno::EAGAIN));
            signal(input.as_fd()).unwrap();
            let mut bytes = [0; 9];
            assert_eq!((read(output.as_fd(), &mut bytes), bytes[0]), (Ok(8), 1));
            while write(input.as_fd(), &[7; 4096]).is_ok() {}
            assert_eq!(write(input.as_fd(), &[7; 4096]), Err(Errno::EAGAIN));
            assert_eq!(signal(input.as_fd()), Ok(()), "a signal is pending");
            drop(output);
            assert_eq!(signal(input.as_fd()), Err(Errno::EPIPE), "the reading end is closed");
        });
    }

    /// Rules F9.3 and F9.5.
    #[test]
    fn eventfds_and_streams_are_recognised() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let (pipe, _) = nix::unistd::pipe().unwrap();
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap();
        let one = eventfd(3);
        assert!(is_eventfd(one.as_fd()));
        assert!(![stream.as_fd(), pipe.as_fd(), file.as_fd(), epoll.0.as_fd()].into_iter().any(is_eventfd));
        assert!([stream.as_fd(), pipe.as_fd()].into_iter().all(is_stream) && !is_stream(file.as_fd()));
        assert_eq!(take(one.as_fd()), Ok(3), "is_eventfd does not signal");
        assert!(is_same_file(one.as_fd(), one.try_clone().unwrap().as_fd()));
        assert!(!is_same_file(one.as_fd(), eventfd(0).as_fd()));
    }
}
