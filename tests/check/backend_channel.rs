//! What a back-end can do wrong with its channel, and with notifications that are messages (rules B1, B3).

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_migrate::abi::vhost::{VHOST_ACCESS_RO, VHOST_IOTLB_MISS};
use vhost_migrate::abi::vhost_user::{BackendRequest, Header, IotlbMsg, VringState};
use zerocopy::{FromZeros, IntoBytes};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ChannelFault {
    /// Who closes it, or sends noise over it, loses the connection.
    EndsConnection,
    /// Another one is closed.
    IgnoresReplacement,
    /// Every completion is told over it, and room is waited for.
    BlocksOnFullChannel,
    /// No calls by messages.
    SendsNoCalls,
    /// Kicks by messages are acknowledged, and that is all.
    IgnoresKicks,
    /// Kicks by messages start no ring.
    KicksDoNotStart,
    /// Misses without end go over every channel, and nobody reads how they are acknowledged.
    Floods,
}

/// The back-end's end of a channel, once more.
pub(crate) struct ChannelSocket(UnixStream);

impl ChannelSocket {
    pub(crate) fn new(socket: OwnedFd) -> ChannelSocket {
        ChannelSocket(socket.into())
    }

    /// Whether it is closed, or something has come over it.
    pub(crate) fn is_over(&self) -> bool {
        let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO) == Ok(1)
    }

    /// Asks for translations until the channel is over.
    pub(crate) fn flood(mut self) {
        let body = IotlbMsg { iova: 1 << 32, perm: VHOST_ACCESS_RO, kind: VHOST_IOTLB_MISS, ..IotlbMsg::new_zeroed() };
        let header = Header { request: BackendRequest::IOTLB_MSG.0, flags: 9, size: size_of_val(&body) as u32 };
        let message = [header.as_bytes(), body.as_bytes()].concat();
        std::thread::spawn(move || while self.0.write_all(&message).is_ok() {});
    }

    /// Calls for ring 0, as soon as there is room.
    pub(crate) fn call(&self) {
        let body = VringState { index: 0, num: 0 };
        let header = Header { request: BackendRequest::VRING_CALL.0, flags: 1, size: size_of_val(&body) as u32 };
        let _ = (&self.0).write_all(&[header.as_bytes(), body.as_bytes()].concat());
    }
}
