//! A raw front-end: sends and receives single protocol messages without checks of its own.

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use vhost_migrate::abi::vhost_user::{FrontendRequest as Code, Header, VringState};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Time limit of every wait in a test.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

pub(crate) const VERSION: u32 = Header::FLAG_VERSION;
pub(crate) const NEED_REPLY: u32 = Header::FLAG_VERSION | Header::FLAG_NEED_REPLY;

pub(crate) struct RawFrontend {
    pub(crate) socket: UnixStream,
}

/// A message with a ring's state, as it goes over the socket.
pub(crate) fn ring_message(code: Code, flags: u32, state: VringState) -> Vec<u8> {
    let header = Header { request: code.0, flags, size: size_of::<VringState>() as u32 };
    [header.as_bytes(), state.as_bytes()].concat()
}

impl RawFrontend {
    pub(crate) fn connect(path: &Path) -> RawFrontend {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        RawFrontend { socket }
    }

    /// Sends any header, payload and fds.
    pub(crate) fn send(&self, code: Code, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = Header { request: code.0, flags, size: payload.len() as u32 };
        self.send_bytes(&[header.as_bytes(), payload].concat(), fds);
    }

    pub(crate) fn send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.try_send_bytes(bytes, fds), Ok(bytes.len()));
    }

    /// As `send_bytes`, to a back-end that may have hung up.
    pub(crate) fn try_send_bytes(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> nix::Result<usize> {
        let raw: Vec<_> = fds.iter().map(|fd| fd.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let fd = self.socket.as_raw_fd();
        sendmsg::<()>(fd, &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
    }

    /// The next message from the back-end.
    pub(crate) fn receive(&self) -> (Header, Vec<u8>, Option<OwnedFd>) {
        let mut header = Header { request: 0, flags: 0, size: 0 };
        let mut space = nix::cmsg_space!([i32; 4]);
        let mut iov = [std::io::IoSliceMut::new(header.as_mut_bytes())];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_WAITALL;
        let message = recvmsg::<()>(self.socket.as_raw_fd(), &mut iov, Some(&mut space), flags).unwrap();
        let fds = message.cmsgs().unwrap().find_map(|control| match control {
            ControlMessageOwned::ScmRights(fds) => Some(fds),
            _ => None,
        });
        assert_eq!(message.bytes, size_of::<Header>(), "the back-end has hung up");
        // SAFETY: the system has just opened this fd for us.
        let fd = fds.map(|fds| unsafe { OwnedFd::from_raw_fd(fds[0]) });
        let mut payload = vec![0; header.size as usize];
        (&self.socket).read_exact(&mut payload).unwrap();
        (header, payload, fd)
    }

    /// The reply to `code`, whose header is checked to the bit (rule F2.2).
    pub(crate) fn reply(&self, code: Code) -> Vec<u8> {
        let (header, payload, _) = self.receive();
        assert_eq!((Code(header.request), header.flags), (code, 5));
        payload
    }

    /// A request that has a reply of its own.
    pub(crate) fn request(&self, code: Code, payload: &[u8]) -> Vec<u8> {
        self.send(code, VERSION, payload, &[]);
        self.reply(code)
    }

    /// The same, with fds.
    pub(crate) fn request_with_fds(&self, code: Code, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Vec<u8> {
        self.send(code, VERSION, payload, fds);
        self.reply(code)
    }

    pub(crate) fn request_u64(&self, code: Code) -> u64 {
        u64::read_from_bytes(&self.request(code, &[])).unwrap()
    }

    /// A request without a reply.
    pub(crate) fn send_body(&self, code: Code, body: &(impl IntoBytes + Immutable)) {
        self.send(code, VERSION, body.as_bytes(), &[]);
    }

    /// Sends a request with need-reply. Returns its acknowledgement, 0 for success (rule F4.1).
    pub(crate) fn acknowledged(&self, code: Code, payload: &[u8], fds: &[BorrowedFd<'_>]) -> u64 {
        self.send(code, NEED_REPLY, payload, fds);
        u64::read_from_bytes(&self.reply(code)).unwrap()
    }

    pub(crate) fn send_acknowledged(&self, code: Code, body: &(impl IntoBytes + Immutable), fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.acknowledged(code, body.as_bytes(), fds), 0, "{code} was refused");
    }

    pub(crate) fn ring_base(&self, index: u32) -> u32 {
        self.send_body(Code::GET_VRING_BASE, &VringState { index, num: 0 });
        self.ring_base_reply(index)
    }

    pub(crate) fn ring_base_reply(&self, index: u32) -> u32 {
        let state = VringState::read_from_bytes(&self.reply(Code::GET_VRING_BASE)).unwrap();
        assert_eq!(state.index, index);
        state.num
    }

    /// Waits until the back-end has processed all messages sent so far (rule F4.4).
    pub(crate) fn wait_until_processed(&self) {
        self.request_u64(Code::GET_FEATURES);
    }

    /// Returns true if the back-end has hung up and everything it sent was read.
    pub(crate) fn is_closed(&self) -> bool {
        match (&self.socket).read(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }

    pub(crate) fn send_slowly(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) {
        let fds: Vec<_> = fd.into_iter().collect();
        let (first, rest) = bytes.split_at(1);
        self.send_bytes(first, &fds);
        for byte in rest {
            (&self.socket).write_all(&[*byte]).unwrap();
        }
    }
}

impl AsFd for RawFrontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
