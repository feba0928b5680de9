//! vhost-user messages with their fds, for a proxy between a front-end and a back-end.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::close;
use vhost_migrate::abi::vhost_user::{FrontendRequest, Header};
use zerocopy::{FromBytes, IntoBytes};

const MAX_FDS: usize = 8;
const MAX_PAYLOAD: u32 = 1 << 16;

/// A message and its fds, which the receiver passes on or closes.
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<RawFd>,
}

/// Returns true if the back-end replies to this message (rules F3.1 and F4.1).
pub(crate) fn has_reply(header: &Header) -> bool {
    const ANSWERED: &[FrontendRequest] = &[
        FrontendRequest::GET_FEATURES,
        FrontendRequest::GET_PROTOCOL_FEATURES,
        FrontendRequest::GET_QUEUE_NUM,
        FrontendRequest::GET_VRING_BASE,
        FrontendRequest::SET_LOG_BASE,
        FrontendRequest::GET_CONFIG,
        FrontendRequest::GET_INFLIGHT_FD,
        FrontendRequest::GET_MAX_MEM_SLOTS,
        FrontendRequest::GET_STATUS,
        FrontendRequest::SET_DEVICE_STATE_FD,
        FrontendRequest::CHECK_DEVICE_STATE,
    ];
    header.flags & Header::FLAG_NEED_REPLY != 0 || ANSWERED.contains(&FrontendRequest(header.request))
}

/// Receives a message; `None` at the end of the connection.
pub(crate) fn receive(mut stream: &UnixStream) -> Option<Message> {
    let mut head = [0; size_of::<Header>()];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut fds = Vec::new();
    let read = loop {
        let mut buffers = [IoSliceMut::new(&mut head)];
        match recvmsg::<()>(stream.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(message) => {
                for control in message.cmsgs().ok()? {
                    if let ControlMessageOwned::ScmRights(rights) = control {
                        fds.extend(rights);
                    }
                }
                break message.bytes;
            }
            Err(nix::Error::EINTR) => {}
            Err(_) => return None,
        }
    };
    if read == 0 {
        return None;
    }
    stream.read_exact(&mut head[read..]).ok()?;
    let header = Header::read_from_bytes(&head).ok()?;
    assert!(header.size <= MAX_PAYLOAD, "a payload of {} bytes", header.size);
    let mut payload = vec![0; header.size as usize];
    stream.read_exact(&mut payload).ok()?;
    Some(Message { header, payload, fds })
}

/// Forwards a received message and closes its fds.
pub(crate) fn pass_on(stream: &UnixStream, message: &Message) -> Option<()> {
    let sent = send(stream, message);
    for &fd in &message.fds {
        let _ = close(fd);
    }
    sent
}

/// Sends a message. Its fds stay open.
pub(crate) fn send(mut stream: &UnixStream, message: &Message) -> Option<()> {
    let bytes = [message.header.as_bytes(), &message.payload].concat();
    let rights = [ControlMessage::ScmRights(&message.fds)];
    let control = if message.fds.is_empty() { &rights[..0] } else { &rights[..] };
    let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None);
    stream.write_all(&bytes[sent.ok()?..]).ok()
}
