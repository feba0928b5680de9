//! One message of the vhost-user protocol, taken apart, and its reply, put together.
//!
//! What messages mean is the business of `session`; sockets are the business of `server`.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::BackendError;
use crate::abi::vhost_user::{Header, MemoryHeader, MemoryRegion, Request as Code};
use crate::sys::socket;

/// The most file descriptors that one message can bring.
pub const MAX_FDS: usize = socket::MAX_FDS;

/// The largest payload accepted, in bytes: a memory table with as many regions as fds can come with it.
pub const MAX_PAYLOAD: u32 = (size_of::<MemoryHeader>() + MAX_FDS * size_of::<MemoryRegion>()) as u32;

/// A request of the front-end. Whatever fds it brought are closed with it, unless they are taken out.
#[derive(Debug)]
pub struct VhostUserMessage {
    /// What it asks.
    pub code: Code,
    /// The flags of its header (rule F2.1).
    pub flags: u32,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// The file descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

impl VhostUserMessage {
    /// Checks a header, and tells how many bytes of payload follow it.
    ///
    /// # Errors
    /// [`BackendError::Version`] and [`BackendError::PayloadTooLarge`]: after either, nothing that follows can be understood.
    pub fn payload_size(header: &Header) -> Result<usize, BackendError> {
        let code = Code(header.request);
        if header.flags & Header::FLAG_VERSION_MASK != Header::FLAG_VERSION {
            return Err(BackendError::Version { code, flags: header.flags });
        }
        if header.size > MAX_PAYLOAD {
            return Err(BackendError::PayloadTooLarge { code, size: header.size, max: MAX_PAYLOAD });
        }
        Ok(header.size as usize)
    }

    /// The payload as a wire structure; more bytes than it has are ignored (rule F6.1).
    ///
    /// # Errors
    /// [`BackendError::ShortPayload`].
    pub fn body<T: FromBytes>(&self) -> Result<T, BackendError> {
        match T::read_from_prefix(&self.payload) {
            Ok((body, _)) => Ok(body),
            Err(_) => {
                let (got, needed) = (self.payload.len(), size_of::<T>());
                Err(BackendError::ShortPayload { code: self.code, got, needed })
            }
        }
    }

    /// The one fd that this request must bring.
    ///
    /// # Errors
    /// [`BackendError::FdCount`] if it brought none, or several.
    pub fn only_fd(&mut self) -> Result<OwnedFd, BackendError> {
        match (self.fds.pop(), self.fds.len()) {
            (Some(fd), 0) => Ok(fd),
            (_, left) => {
                let got = if left == 0 { 0 } else { left + 1 };
                Err(BackendError::FdCount { code: self.code, got, needed: 1 })
            }
        }
    }
}

/// What goes back to the front-end.
#[derive(Debug)]
pub struct VhostUserReply {
    /// The request that is answered.
    pub code: Code,
    /// What follows the header.
    pub payload: Vec<u8>,
    /// A file descriptor to send along.
    pub fd: Option<OwnedFd>,
}

impl VhostUserReply {
    pub(super) fn new(code: Code, body: &(impl IntoBytes + Immutable)) -> VhostUserReply {
        VhostUserReply { code, payload: body.as_bytes().to_vec(), fd: None }
    }

    /// Header and payload as they go over the socket; the flags are exactly 5 (rule F2.2).
    pub fn to_bytes(&self) -> Vec<u8> {
        let size = self.payload.len() as u32;
        let header = Header { request: self.code.0, flags: Header::REPLY_FLAGS, size };
        [header.as_bytes(), &self.payload].concat()
    }
}
