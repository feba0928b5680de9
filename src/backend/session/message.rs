//! Decoding of vhost-user messages and encoding of replies.
//!
//! The meaning of messages is in `session`, sockets are in `server`.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::abi::vhost_user::{FrontendRequest as Code, Header, MemoryHeader, MemoryRegion};
use crate::backend::BackendError;
use crate::sys::socket;

/// Maximum number of file descriptors in one message.
pub const MAX_FDS: usize = socket::MAX_FDS;

/// Maximum accepted payload in bytes: a memory table with as many regions as one message carries file descriptors
/// (rule F1.4).
const MAX_PAYLOAD: u32 = (size_of::<MemoryHeader>() + MAX_FDS * size_of::<MemoryRegion>()) as u32;

/// A request of the front-end. File descriptors that are not taken out are closed with it (rule F5.3).
#[derive(Debug)]
pub struct VhostUserMessage {
    /// The request.
    pub code: Code,
    /// The flags of the header (rule F2.1).
    pub flags: u32,
    /// The bytes after the header.
    pub payload: Vec<u8>,
    /// The file descriptors of the message.
    pub fds: Vec<OwnedFd>,
}

impl VhostUserMessage {
    /// Checks a header and returns the size of its payload in bytes.
    ///
    /// # Errors
    /// [`BackendError::Version`] and [`BackendError::PayloadTooLarge`]. Both make the rest of the connection
    /// undecodable.
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

    /// Decodes the payload as a wire structure. Further bytes are ignored (rule F6.1).
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

    /// Takes the file descriptor of a request that requires exactly one (rule F1.5).
    ///
    /// # Errors
    /// [`BackendError::FdCount`] if there is none, or more than one.
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

/// A reply to the front-end.
#[derive(Debug)]
pub struct VhostUserReply {
    /// The request that is answered.
    pub code: Code,
    /// Content after the header.
    pub payload: Vec<u8>,
    /// A file descriptor to pass along.
    pub fd: Option<OwnedFd>,
}

impl VhostUserReply {
    pub(crate) fn new(code: Code, body: &(impl IntoBytes + Immutable)) -> VhostUserReply {
        VhostUserReply { code, payload: body.as_bytes().to_vec(), fd: None }
    }

    /// Encodes header and payload. The flags are exactly 5 (rule F2.2).
    pub fn to_bytes(&self) -> Vec<u8> {
        let size = self.payload.len() as u32;
        let header = Header { request: self.code.0, flags: Header::REPLY_FLAGS, size };
        [header.as_bytes(), &self.payload].concat()
    }
}
