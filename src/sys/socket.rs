//! Bytes and file descriptors over a UNIX stream socket.
//!
//! nix hands received fds out as numbers, and not at all when the system could install only some of them: those would
//! leak. Here each one is owned from the start.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// The most fds that one message of a UNIX socket carries (SCM_MAX_FD).
pub(crate) const MAX_FDS: usize = 253;

/// Room for a control message with [`MAX_FDS`] fds, aligned as its header must be.
#[repr(C, align(8))]
struct Control([u8; 1040]);

// SAFETY: CMSG_SPACE only computes.
const _: () = assert!(unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize <= 1040);

/// Receives at most `buf.len()` bytes; fds that came along are appended to `fds`, close-on-exec. 0 is the end.
pub(crate) fn receive(socket: BorrowedFd<'_>, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut control = Control([0; 1040]);
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: all zeroes is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = control.0.len() as _;
    // SAFETY: the header points to buffers that live across the call, with their true lengths.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
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
    Ok(received)
}

/// Sends all of `bytes`, with `fds` along the first of them. A peer that is gone is an error, not a signal.
pub(crate) fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
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
        let result = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) };
        match usize::try_from(result) {
            Ok(count) => sent += count,
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Err(io::Error::last_os_error()),
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
