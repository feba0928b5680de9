//! Reads and writes of descriptors that a peer has as well, which return at once whatever the peer does.
//!
//! O_NONBLOCK is a flag of the open file, and so the peer's, too: it can be taken back at any time. Nor does a poll help,
//! as the peer may fill or empty the file right after it (rules F9.1, F9.2). RWF_NOWAIT and MSG_DONTWAIT belong to one call. A write
//! to an eventfd has no such flag; the kernel's own signals never wait, and asynchronous I/O (io_submit) gives one for
//! every completion.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;

use libc::{c_int, c_long, c_ulong};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};

/// A number of the kernel's (`linux/aio_abi.h`).
const IOCB_CMD_PREAD: u16 = 0;
/// A flag of the kernel's (`linux/aio_abi.h`).
const IOCB_FLAG_RESFD: u32 = 1;
/// A number of the kernel's (`linux/kcmp.h`).
const KCMP_FILE: c_int = 0;
/// Completions that are taken back at once.
const REAPED: usize = 32;
/// Attempts to find room for a completion, which other threads take as well.
const TRIES: usize = 1000;

/// `struct iocb`, little-endian.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    signalled: u32,
}

const _: () = assert!(size_of::<Iocb>() == 64);

/// Signals an eventfd, or sends the same 8 bytes through a socket or pipe. A receiver that has no room for more has a
/// signal pending: that is no error.
///
/// # Errors
/// What the system says, for example when the other end of a socket is closed.
pub(crate) fn signal(fd: BorrowedFd<'_>) -> nix::Result<()> {
    if submit(fd, 0).is_ok() {
        return Ok(());
    }
    let one = 1u64.to_ne_bytes();
    let mut rest = one.as_slice();
    while !rest.is_empty() {
        match write(fd, rest) {
            // Pipes and sockets may take part of the 8 bytes; the receiver counts on whole ones.
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Takes the signals of an eventfd back; their number.
///
/// # Errors
/// `EAGAIN` if there are none; else what the system says.
pub(crate) fn take(eventfd: BorrowedFd<'_>) -> nix::Result<u64> {
    let mut count = [0; 8];
    match read(eventfd, &mut count)? {
        8 => Ok(u64::from_ne_bytes(count)),
        _ => Err(Errno::EPIPE),
    }
}

/// Reads what there is. 0 is the end.
///
/// # Errors
/// `EAGAIN` if there is nothing; else what the system says.
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

/// Writes what there is room for.
///
/// # Errors
/// `EAGAIN` if there is none; else what the system says. A peer that is gone is no signal, if the file is a socket.
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
    // Which flags a request has is looked at when its eventfd has been found to be one.
    match submit(fd, u32::MAX) {
        Err(Errno::EOPNOTSUPP) => true,
        Ok(()) | Err(Errno::EINVAL | Errno::EBADF) => false,
        // Without asynchronous I/O: it is none of what has a type.
        Err(_) => kind(fd).is_ok_and(|kind| kind.is_empty()),
    }
}

/// Returns true for two numbers of one open file, and false also if the system can't tell.
pub(crate) fn is_same_file(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    let process = std::process::id();
    // SAFETY: takes five numbers, and changes nothing.
    let order =
        unsafe { libc::syscall(libc::SYS_kcmp, process, process, KCMP_FILE, one.as_raw_fd(), other.as_raw_fd()) };
    order == 0
}

/// Returns true for what a stream of bytes can come through: not for files of a file system, of which a poll says nothing.
pub(crate) fn is_stream(fd: BorrowedFd<'_>) -> bool {
    kind(fd).is_ok_and(|kind| [SFlag::S_IFIFO, SFlag::S_IFSOCK, SFlag::S_IFCHR].contains(&kind))
}

/// Has the context for signals made now, as a process must that can't do so later.
pub(crate) fn prepare() {
    context();
}

fn kind(fd: BorrowedFd<'_>) -> nix::Result<SFlag> {
    Ok(SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT)
}

/// Asks first, where the kernel knows no better way: pipes before Linux 6.4, and eventfds without io_submit.
fn ready(fd: BorrowedFd<'_>, flags: PollFlags) -> nix::Result<()> {
    if !kind(fd).is_ok_and(|kind| kind.is_empty() || kind == SFlag::S_IFIFO) {
        return Err(Errno::EOPNOTSUPP);
    }
    match poll(&mut [PollFd::new(fd, flags)], PollTimeout::ZERO)? {
        0 => Err(Errno::EAGAIN),
        _ => Ok(()),
    }
}

/// Submits a read of no bytes that signals `eventfd` when it is complete, which it is at once.
///
/// # Errors
/// `EINVAL` if it is no eventfd, and `ENOSYS` if the system has no asynchronous I/O for this process.
fn submit(eventfd: BorrowedFd<'_>, rw_flags: u32) -> nix::Result<()> {
    let context = context().ok_or(Errno::ENOSYS)?;
    let number = eventfd.as_raw_fd() as u32;
    let (opcode, flags) = (IOCB_CMD_PREAD, IOCB_FLAG_RESFD);
    let mut request = Iocb { rw_flags, opcode, fd: number, flags, signalled: number, ..Iocb::default() };
    let mut requests = [&raw mut request];
    for _ in 0..TRIES {
        // SAFETY: one pointer to a whole iocb; the buffer that it names has no bytes.
        let submitted = unsafe { libc::syscall(libc::SYS_io_submit, context, 1 as c_long, requests.as_mut_ptr()) };
        match Errno::result(submitted) {
            Err(Errno::EAGAIN) => reap(context),
            submitted => return submitted.map(drop),
        }
    }
    Err(Errno::EAGAIN)
}

/// Makes room for more completions. Nobody needs them.
fn reap(context: c_ulong) {
    let mut events = [[0u64; 4]; REAPED];
    let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: room for REAPED io_events of 32 bytes, which the kernel fills, and a timespec, which it reads.
    unsafe {
        libc::syscall(
            libc::SYS_io_getevents,
            context,
            0 as c_long,
            REAPED as c_long,
            events.as_mut_ptr(),
            &raw const none,
        )
    };
}

/// The context for all signals of this process; `None` if the system gives none.
fn context() -> Option<c_ulong> {
    static CONTEXT: OnceLock<Option<c_ulong>> = OnceLock::new();
    *CONTEXT.get_or_init(|| {
        let mut context: c_ulong = 0;
        // SAFETY: a 0 for the kernel to put the new context into.
        if unsafe { libc::syscall(libc::SYS_io_setup, 1 as c_long, &raw mut context) } == 0 {
            return Some(context);
        }
        let error = io::Error::last_os_error();
        tracing::warn!("io_setup: {error}: a peer that fills an eventfd may stop its own ring (see fs.aio-max-nr)");
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

    /// Does it, unless it blocks.
    fn returns<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, is_done) = channel();
        std::thread::spawn(move || done.send(what()));
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
    fn a_full_eventfd_that_blocks_is_signalled_already() {
        returns(|| {
            let full = eventfd(u64::MAX - 1);
            (0..500).try_for_each(|_| signal(full.as_fd())).unwrap();
            assert_eq!(take(full.as_fd()), Ok(u64::MAX));
        });
    }

    #[rstest]
    #[case::stream(UnixStream::pair().map(|(ours, theirs)| (ours.into(), theirs.into())).unwrap())]
    #[case::pipe(nix::unistd::pipe().map(|(output, input)| (input, output)).unwrap())]
    fn what_is_full_or_empty_and_blocks_says_so(#[case] (input, output): (OwnedFd, OwnedFd)) {
        returns(move || {
            assert_eq!(read(output.as_fd(), &mut [0; 9]), Err(Errno::EAGAIN));
            signal(input.as_fd()).unwrap();
            let mut bytes = [0; 9];
            assert_eq!((read(output.as_fd(), &mut bytes), bytes[0]), (Ok(8), 1));
            while write(input.as_fd(), &[7; 4096]).is_ok() {}
            assert_eq!(write(input.as_fd(), &[7; 4096]), Err(Errno::EAGAIN));
            assert_eq!(signal(input.as_fd()), Ok(()), "one is pending");
            drop(output);
            assert_eq!(signal(input.as_fd()), Err(Errno::EPIPE), "nobody will ever read it");
        });
    }

    #[test]
    fn kinds_of_files_are_told_apart() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let (pipe, _) = nix::unistd::pipe().unwrap();
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let epoll = nix::sys::epoll::Epoll::new(nix::sys::epoll::EpollCreateFlags::empty()).unwrap();
        let one = eventfd(3);
        assert!(is_eventfd(one.as_fd()));
        assert!(![stream.as_fd(), pipe.as_fd(), file.as_fd(), epoll.0.as_fd()].into_iter().any(is_eventfd));
        assert!([stream.as_fd(), pipe.as_fd()].into_iter().all(is_stream) && !is_stream(file.as_fd()));
        assert_eq!(take(one.as_fd()), Ok(3), "to ask signals nothing");
        assert!(is_same_file(one.as_fd(), one.try_clone().unwrap().as_fd()));
        assert!(!is_same_file(one.as_fd(), eventfd(0).as_fd()));
    }
}
