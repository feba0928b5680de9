//! Bytes and file descriptors over a UNIX stream socket.
//!
//! nix returns received fds as plain numbers, and returns none if the system could install only some of them: those
//! would leak. Here each received fd is an `OwnedFd` from the start.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_fd, socket};

/// Maximum number of fds in one message of a UNIX socket (SCM_MAX_FD).
pub(crate) const MAX_FDS: usize = 253;

/// Buffer for a control message with [`MAX_FDS`] fds, aligned as its header must be.
#[repr(C, align(8))]
struct ControlBuffer([u8; 1040]);

// SAFETY: CMSG_SPACE only computes.
const _: () = assert!(unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize <= 1040);

/// Receives at most `buf.len()` bytes without blocking, and returns their number; 0 at the end of the stream.
///
/// Received fds are appended to `fds`, close-on-exec. Fds beyond `max_fds` in total are closed: every byte of the
/// stream may bring [`MAX_FDS`] new ones.
///
/// # Errors
/// `WouldBlock` if the socket has nothing to receive, otherwise the error of the system.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    max_fds: usize,
) -> io::Result<usize> {
    let mut control = ControlBuffer([0; 1040]);
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: all zeroes is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = control.0.len() as _;
    // SAFETY: the header points to buffers that live across the call, with their true lengths.
    let received =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the system has filled the header in, and its control buffer is alive.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    while !next.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a whole header inside the control buffer.
        let (message, data) = unsafe { (next.read(), libc::CMSG_DATA(next)) };
        if message.cmsg_level == libc::SOL_SOCKET && message.cmsg_type == libc::SCM_RIGHTS {
            #[allow(clippy::unnecessary_cast, reason = "musl has 32 bits for it")]
            let length = message.cmsg_len as usize;
            let bytes = length.saturating_sub(data as usize - next as usize);
            for index in 0..bytes / size_of::<RawFd>() {
                // SAFETY: the system filled cmsg_len bytes with fds, each of which it opened for this process.
                fds.push(unsafe { OwnedFd::from_raw_fd(data.cast::<RawFd>().add(index).read_unaligned()) });
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR; `next` is a header inside the buffer.
        next = unsafe { libc::CMSG_NXTHDR(&raw const header, next) };
    }
    fds.truncate(max_fds);
    Ok(received)
}

/// Connects to the listening socket at `path` without blocking. The returned socket is non-blocking.
///
/// # Errors
/// `WouldBlock` if the listener's queue of connections is full, otherwise the error of the system.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let address = UnixAddr::new(path).map_err(|errno| match errno {
        Errno::ENAMETOOLONG => io::ErrorKind::InvalidInput.into(),
        errno => io::Error::from(errno),
    })?;
    connect_fd(fd.as_raw_fd(), &address)?;
    Ok(fd.into())
}

/// Returns true if the listener at `path` has accepted a connection that is still open.
///
/// Returns false also if this is not known, for example if the listener has bound another spelling of the path.
pub(crate) fn has_accepted(path: &Path) -> bool {
    let sockets = std::fs::read("/proc/net/unix").unwrap_or_default();
    accepted(&sockets, path)
}

/// As [`has_accepted`], from the contents of /proc/net/unix. The fields of a line are address, references, protocol,
/// flags, type, state, inode and path. A connection that is not accepted yet has inode 0.
fn accepted(sockets: &[u8], path: &Path) -> bool {
    const CONNECTED: &[u8] = b"03";
    sockets.split(|byte| *byte == b'\n').any(|line| {
        let mut fields = line.splitn(8, |byte| *byte == b' ').skip(5);
        // The inode is padded on its left.
        let (state, rest) = (fields.next(), fields.next().map(|_| line));
        let bound = rest.and_then(|line| line.strip_suffix(path.as_os_str().as_encoded_bytes()));
        let inode =
            bound.and_then(|line| line.strip_suffix(b" ")).and_then(|line| line.rsplit(|byte| *byte == b' ').next());
        state == Some(CONNECTED) && inode.is_some_and(|inode| inode != b"0" && inode.iter().all(u8::is_ascii_digit))
    })
}

/// Waits until `fd` is ready for `events` or until `deadline`, and returns true if it is ready.
///
/// # Errors
/// The error of the system.
pub(crate) fn ready(fd: BorrowedFd<'_>, events: PollFlags, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a poll that returns too early would spin.
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, events)], if left.is_zero() { PollTimeout::ZERO } else { timeout }) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// As [`send`], but waits for space in the socket's buffer until `deadline` at most.
///
/// # Errors
/// `TimedOut` at the deadline, otherwise the error of the system.
pub(crate) fn send_until(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> io::Result<()> {
    send_with(socket, bytes, fds, || ready(socket, PollFlags::POLLOUT, deadline))
}

/// As [`send`], but calls `wait_for_space` whenever the socket's buffer is full.
///
/// # Errors
/// `TimedOut` if `wait_for_space` returns false, its own errors, otherwise the error of the system.
pub(crate) fn send_with(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    mut wait_for_space: impl FnMut() -> io::Result<bool>,
) -> io::Result<()> {
    transmit(socket, bytes, fds, libc::MSG_DONTWAIT, || match wait_for_space()? {
        true => Ok(()),
        false => Err(io::ErrorKind::TimedOut.into()),
    })
}

/// Sends all of `bytes`, with `fds` attached to the first of them. A closed peer raises no SIGPIPE.
///
/// # Errors
/// `InvalidInput` for more than [`MAX_FDS`] fds, `WouldBlock` if a non-blocking socket is full, otherwise the error of
/// the system.
pub(crate) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    transmit(socket, bytes, fds, 0, || Err(io::ErrorKind::WouldBlock.into()))
}

/// Sends all of `bytes`. `full` is called whenever the socket's buffer is full; after `Ok` the send is tried again.
fn transmit(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: libc::c_int,
    mut full: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut control = ControlBuffer([0; 1040]);
    if fds.len() > MAX_FDS {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut sent = 0;
    while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
        let mut iov = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
        // SAFETY: all zeroes is a valid msghdr.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_iov = &raw mut iov;
        header.msg_iovlen = 1;
        if sent == 0 && !fds.is_empty() {
            let len = size_of_val(fds) as u32;
            header.msg_control = control.0.as_mut_ptr().cast();
            // SAFETY: CMSG_SPACE and CMSG_LEN only compute. The buffer has space for MAX_FDS fds, checked above and at
            // its definition, and is aligned for a header, which CMSG_FIRSTHDR finds at its start.
            unsafe {
                header.msg_controllen = libc::CMSG_SPACE(len) as _;
                let message = libc::CMSG_FIRSTHDR(&raw const header);
                (*message).cmsg_level = libc::SOL_SOCKET;
                (*message).cmsg_type = libc::SCM_RIGHTS;
                (*message).cmsg_len = libc::CMSG_LEN(len) as _;
                let data = libc::CMSG_DATA(message).cast::<RawFd>();
                for (index, fd) in fds.iter().enumerate() {
                    data.add(index).write_unaligned(fd.as_raw_fd());
                }
            }
        }
        // SAFETY: the header points to buffers that live across the call, with their true lengths.
        let result = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL | flags) };
        match usize::try_from(result) {
            Ok(count) => sent += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error if error.kind() == io::ErrorKind::WouldBlock => full()?,
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Returns true if the peer has not yet read everything that was sent to it. A peer that has not accepted the
/// connection has read nothing.
///
/// # Errors
/// The error of the system.
pub(crate) fn is_unread(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ, which is SIOCOUTQ on sockets, writes an int through the pointer.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) } {
        0 => Ok(bytes > 0),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes ownership of an fd that this process inherited, and makes it close-on-exec.
///
/// # Errors
/// `EBADF` if `number` is not an open fd.
pub(crate) fn inherit(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: sets a flag of the fd, and fails if the number is not an open fd.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open. The parent process passed this number on for exactly this use, so nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    #[test]
    fn connecting_to_a_full_listener_does_not_wait_and_has_accepted_sees_only_accepted_connections() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a socket");
        let listener = UnixListener::bind(&path).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
        let first = connect(&path).unwrap();
        let second = connect(&path).unwrap();
        let full = connect(&path).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock, "{full}");
        assert!(!has_accepted(&path), "no connection is accepted");
        send(second.as_fd(), b"hello", &[]).unwrap();
        assert!(is_unread(second.as_fd()).unwrap() && !is_unread(first.as_fd()).unwrap());
        let accepted = listener.accept().unwrap();
        assert!(has_accepted(&path));
        assert!(!has_accepted(&folder.path().join("socket")) && !has_accepted(Path::new("socket")));
        drop((accepted, first));
        assert!(!has_accepted(&path));
    }

    #[test]
    fn send_until_times_out_if_the_peer_does_not_read() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let bytes = vec![0; 16 << 20];
        let deadline = Instant::now() + Duration::from_millis(20);
        let error = send_until(ours.as_fd(), &bytes, &[], deadline).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        assert!(Instant::now() >= deadline);
        drop(theirs);
    }
}
