//! Bytes and file descriptors over a UNIX stream socket.
//!
//! nix hands received fds out as numbers, and not at all when the system could install only some of them: those would
//! leak. Here each one is owned from the start.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect as connect_fd, socket};

/// The most fds that one message of a UNIX socket carries (SCM_MAX_FD).
pub(crate) const MAX_FDS: usize = 253;

/// Room for a control message with [`MAX_FDS`] fds, aligned as its header must be.
#[repr(C, align(8))]
struct Control([u8; 1040]);

// SAFETY: CMSG_SPACE only computes.
const _: () = assert!(unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize <= 1040);

/// Receives at most `buf.len()` bytes; fds that came along are appended to `fds`, close-on-exec. Those that make them more
/// than `most` are closed: every byte may bring [`MAX_FDS`] new ones. 0 is the end. Never waits: `WouldBlock` is a socket
/// without anything to receive.
pub(crate) fn receive(
    socket: BorrowedFd<'_>,
    buf: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    most: usize,
) -> io::Result<usize> {
    let mut control = Control([0; 1040]);
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
    // SAFETY: the header is as the system left it, and its control buffer is alive.
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
    fds.truncate(most);
    Ok(received)
}

/// Connects to the listening socket at `path`. Never waits: `WouldBlock` is a listener whose queue of connections is full.
/// The connection does not block either.
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

/// Returns true if the listener at `path` has accepted a connection that is still open. False if it is not known, as when
/// it has bound another spelling of the path.
pub(crate) fn has_accepted(path: &Path) -> bool {
    let sockets = std::fs::read("/proc/net/unix").unwrap_or_default();
    accepted(&sockets, path)
}

/// The same, by the contents of /proc/net/unix: address, references, protocol, flags, type, state, inode, path. A connection
/// that is not accepted yet has no inode.
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

/// Waits until `fd` is ready for `events`, or until `deadline`; returns whether it is ready.
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

/// As [`send`], but waits for room in the socket no longer than until `deadline`; `TimedOut` then.
pub(crate) fn send_until(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> io::Result<()> {
    send_with(socket, bytes, fds, || ready(socket, PollFlags::POLLOUT, deadline))
}

/// As [`send`], but where the socket has no room `has_room` waits for it; `TimedOut` if it returns false.
pub(crate) fn send_with(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    mut has_room: impl FnMut() -> io::Result<bool>,
) -> io::Result<()> {
    transmit(socket, bytes, fds, libc::MSG_DONTWAIT, || match has_room()? {
        true => Ok(()),
        false => Err(io::ErrorKind::TimedOut.into()),
    })
}

/// Sends all of `bytes`, with `fds` along the first of them. A peer that is gone is an error, not a signal.
pub(crate) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    transmit(socket, bytes, fds, 0, || Err(io::ErrorKind::WouldBlock.into()))
}

/// Sends all of `bytes`; `full` is called when the socket has no room, and decides whether to try again.
fn transmit(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    flags: libc::c_int,
    mut full: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut control = Control([0; 1040]);
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
            // SAFETY: both only compute. The buffer has room for MAX_FDS fds, checked above and at its definition, and
            // is aligned for a header, which CMSG_FIRSTHDR finds at its start.
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

/// Returns true if the peer has not yet read everything that was sent to it. It has read nothing while it has not accepted.
pub(crate) fn is_unread(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ, which TIOCOUTQ is of sockets, writes an int to where it points.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) } {
        0 => Ok(bytes > 0),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes ownership of an fd that this process was started with.
pub(crate) fn inherit(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: only asks about the number, and makes the fd close-on-exec if it is one.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open. Whoever started the process passed it on for this use, by its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    #[test]
    fn a_listener_that_accepts_nothing_is_no_wait_and_known_from_one_that_serves_another() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a socket");
        let listener = UnixListener::bind(&path).unwrap();
        nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
        let first = connect(&path).unwrap();
        let second = connect(&path).unwrap();
        let full = connect(&path).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock, "{full}");
        assert!(!has_accepted(&path), "nobody is served");
        send(second.as_fd(), b"hello", &[]).unwrap();
        assert!(is_unread(second.as_fd()).unwrap() && !is_unread(first.as_fd()).unwrap());
        let accepted = listener.accept().unwrap();
        assert!(has_accepted(&path));
        assert!(!has_accepted(&folder.path().join("socket")) && !has_accepted(Path::new("socket")));
        drop((accepted, first));
        assert!(!has_accepted(&path));
    }

    #[test]
    fn sending_to_a_peer_that_does_not_read_ends_at_the_deadline() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let bytes = vec![0; 16 << 20];
        let deadline = Instant::now() + Duration::from_millis(20);
        let error = send_until(ours.as_fd(), &bytes, &[], deadline).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
        assert!(Instant::now() >= deadline);
        drop(theirs);
    }
}
