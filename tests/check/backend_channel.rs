//! Faults of the back-end channel and of in-band notifications (rules B1, B3).

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nix::poll::PollTimeout;
use vhost_migrate::abi::vhost::{VHOST_ACCESS_RO, VHOST_IOTLB_MISS};
use vhost_migrate::abi::vhost_user::{BackendRequest, Header, IotlbMsg, VringState};
use zerocopy::{FromZeros, IntoBytes};

use crate::wait::is_readable;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ChannelFault {
    /// A closed channel, or noise on it, ends the connection.
    EndsConnection,
    /// A second channel is closed.
    IgnoresReplacement,
    /// Sends a call for every completion, and blocks on a full socket.
    BlocksOnFullChannel,
    /// Sends no in-band calls.
    SendsNoCalls,
    /// Acknowledges in-band kicks and ignores them.
    IgnoresKicks,
    /// In-band kicks do not start a ring.
    KicksDoNotStart,
    /// Sends misses without end on every channel, and does not read the acknowledgements.
    Floods,
}

/// Duplicate of the back-end's end of a channel.
pub(crate) struct ChannelSocket(UnixStream);

impl ChannelSocket {
    pub(crate) fn new(socket: OwnedFd) -> ChannelSocket {
        ChannelSocket(socket.into())
    }

    /// Returns true if the channel is closed or data has arrived.
    pub(crate) fn is_over(&self) -> bool {
        is_readable(&self.0, PollTimeout::ZERO)
    }

    /// Sends misses until the channel is closed.
    pub(crate) fn flood(mut self) {
        let body = IotlbMsg { iova: 1 << 32, perm: VHOST_ACCESS_RO, kind: VHOST_IOTLB_MISS, ..IotlbMsg::new_zeroed() };
        let header = Header { request: BackendRequest::IOTLB_MSG.0, flags: 9, size: size_of_val(&body) as u32 };
        let message = [header.as_bytes(), body.as_bytes()].concat();
        std::thread::spawn(move || while self.0.write_all(&message).is_ok() {});
    }

    /// Sends a call for ring 0, as soon as there is room.
    pub(crate) fn call(&self) {
        let body = VringState { index: 0, num: 0 };
        let header = Header { request: BackendRequest::VRING_CALL.0, flags: 1, size: size_of_val(&body) as u32 };
        let _ = (&self.0).write_all(&[header.as_bytes(), body.as_bytes()].concat());
    }
}
