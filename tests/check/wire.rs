//! Socket messages of the faulty back-ends.

use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recv, recvmsg, sendmsg};
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, Header};
use vhost_migrate::unstable::backend::VhostUserMessage;
use zerocopy::{FromZeros, IntoBytes};

use crate::fault::Fault;
use crate::wait::is_readable;

/// Returns true if the flags have the only defined version.
pub(crate) fn is_known(flags: u32) -> bool {
    flags & Header::FLAG_VERSION_MASK == Header::FLAG_VERSION
}

/// Returns true if another message is available or arrives soon.
pub(crate) fn more_follows(socket: &UnixStream) -> bool {
    is_readable(socket, 50u8)
}

/// Errors of a closed connection show at the next read.
pub(crate) fn send(socket: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) {
    let raw: Vec<_> = fd.iter().map(|fd| fd.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    let iov = [std::io::IoSlice::new(bytes)];
    let _ = sendmsg::<()>(socket.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None);
}

/// Receives the next message. Returns `None` if the connection is closed, or the fault closes it.
pub(crate) fn receive(socket: &mut UnixStream, fault: Fault) -> Option<VhostUserMessage> {
    let mut header = Header::new_zeroed();
    let mut space = nix::cmsg_space!([i32; 8]);
    let mut fds = Vec::new();
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
    let mut iov = [std::io::IoSliceMut::new(header.as_mut_bytes())];
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags).ok()?;
    for control in received.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(rights) = control {
            // SAFETY: recvmsg has just created these fds, and nothing else owns them.
            fds.extend(rights.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if received.bytes != size_of::<Header>() {
        return None;
    }
    if fault == Fault::DiesOfVersion && !is_known(header.flags) {
        return Some(VhostUserMessage { code: Code(header.request), flags: header.flags, payload: Vec::new(), fds });
    }
    let mut payload = vec![0; VhostUserMessage::payload_size(&header).ok()?];
    if fault == Fault::NeedsWholeMessages && !payload.is_empty() {
        let there = recv(socket.as_raw_fd(), &mut payload, MsgFlags::MSG_DONTWAIT).ok()?;
        if there != payload.len() {
            return None;
        }
    } else {
        socket.read_exact(&mut payload).ok()?;
    }
    Some(VhostUserMessage { code: Code(header.request), flags: header.flags, payload, fds })
}
