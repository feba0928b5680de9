//! One connection to a vhost-user back-end: messages out, acknowledgements and replies in, each before a deadline.
//!
//! Messages without a reply of their own are posted, and settled together: by their acknowledgements, or by a
//! GET_FEATURES round trip where the back-end does not acknowledge (rule F4). What messages mean is not known here.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use zerocopy::{FromBytes, IntoBytes};

use super::super::FrontendError;
use super::sys;
use crate::abi::vhost_user::{Header, Request};

/// Longest reply: GET_CONFIG's 268 bytes, with room for what is to come.
const MAX_REPLY: usize = 4096;

pub(super) struct Channel {
    socket: UnixStream,
    timeout: Duration,
    /// REPLY_ACK is agreed on.
    acks: bool,
    /// Posted and not yet settled.
    posted: Vec<Request>,
}

/// A reply's payload, and the fds that came with it.
pub(super) struct Reply {
    pub(super) request: Request,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reply {
    /// The payload as the one structure it must be.
    pub(super) fn read<T: FromBytes>(&self, rule: &'static str) -> Result<T, FrontendError> {
        T::read_from_bytes(&self.payload).map_err(|_| FrontendError::Breach {
            request: self.request,
            what: format!("an answer of {} bytes, not {}", self.payload.len(), size_of::<T>()),
            rule,
        })
    }
}

impl Channel {
    pub(super) fn connect(path: &Path, timeout: Duration) -> Result<Channel, FrontendError> {
        let failed = |source| FrontendError::Connect { path: path.into(), source };
        let socket = UnixStream::connect(path).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        Ok(Channel { socket, timeout, acks: false, posted: Vec::new() })
    }

    /// From now on posted messages ask for an acknowledgement.
    pub(super) fn use_acks(&mut self) {
        self.acks = true;
    }

    pub(super) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Sends a message that has no reply of its own.
    pub(super) fn post(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        let flags = Header::FLAG_VERSION | if self.acks { Header::FLAG_NEED_REPLY } else { 0 };
        self.send(request, flags, payload, fds)?;
        self.posted.push(request);
        Ok(())
    }

    /// Waits until everything posted is done. On refusals the first is reported, when all are in.
    pub(super) fn settle(&mut self) -> Result<(), FrontendError> {
        let posted = std::mem::take(&mut self.posted);
        if !self.acks {
            let fence = !posted.is_empty();
            return if fence { self.ask(Request::GET_FEATURES, &[], &[]).map(drop) } else { Ok(()) };
        }
        let mut refused = None;
        for request in posted {
            let reply = self.receive(request, self.timeout)?;
            let code: u64 = reply.read("F4").inspect_err(|_| self.close())?;
            if code != 0 && refused.is_none() {
                refused = Some(FrontendError::Refused { request, code });
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// Sends a message that has a reply of its own and waits for that (rule F3).
    pub(super) fn ask(
        &mut self,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, FrontendError> {
        self.ask_within(self.timeout, request, payload, fds)
    }

    /// The same, for what may take longer.
    pub(super) fn ask_within(
        &mut self,
        timeout: Duration,
        request: Request,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Reply, FrontendError> {
        if self.acks {
            self.settle()?;
        }
        self.posted.clear();
        self.send(request, Header::FLAG_VERSION, payload, fds)?;
        self.receive(request, timeout)
    }

    /// Ends the connection; also wakes whoever watches it.
    pub(super) fn close(&self) {
        // An error means that it has ended already.
        let _ = self.socket.shutdown(std::net::Shutdown::Both);
    }

    pub(super) fn hung_up(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLHUP)];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    pub(super) fn watch(&self) -> Result<OwnedFd, FrontendError> {
        self.socket.as_fd().try_clone_to_owned().map_err(FrontendError::system("watch the connection"))
    }

    fn send(&self, request: Request, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrontendError> {
        let header = Header { request: request.0, flags, size: payload.len() as u32 };
        let bytes = [header.as_bytes(), payload].concat();
        let deadline = Instant::now() + self.timeout;
        let (mut rest, mut fds) = (&bytes[..], fds);
        while !rest.is_empty() {
            match sys::send(&self.socket, rest, fds) {
                Ok(sent) => (rest, fds) = (rest.get(sent..).unwrap_or_default(), &[]),
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT, request, deadline, self.timeout)?,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.failed(request, errno)),
            }
        }
        Ok(())
    }

    fn receive(&self, request: Request, timeout: Duration) -> Result<Reply, FrontendError> {
        let deadline = Instant::now() + timeout;
        let mut fds = Vec::new();
        let mut header = [0; size_of::<Header>()];
        self.fill(&mut header, &mut fds, request, deadline, timeout)?;
        let header: Header = zerocopy::transmute!(header);
        let breach = |what: String, rule| {
            self.close();
            Err(FrontendError::Breach { request, what, rule })
        };
        if header.request != request.0 {
            return breach(format!("an answer to {}", Request(header.request)), "F1");
        }
        if header.flags != Header::REPLY_FLAGS {
            return breach(format!("flags {:#x} instead of {:#x}", header.flags, Header::REPLY_FLAGS), "F2");
        }
        let size = header.size as usize;
        if size > MAX_REPLY {
            return breach(format!("an answer of {size} bytes, more than {MAX_REPLY}"), "F6");
        }
        let mut payload = vec![0; size];
        self.fill(&mut payload, &mut fds, request, deadline, timeout)?;
        Ok(Reply { request, payload, fds })
    }

    fn fill(
        &self,
        buf: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        request: Request,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<(), FrontendError> {
        let mut rest = buf;
        while !rest.is_empty() {
            match sys::receive(&self.socket, rest, fds) {
                Ok(0) => return Err(FrontendError::HungUp { request }),
                Ok(received) => rest = rest.get_mut(received..).unwrap_or_default(),
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLIN, request, deadline, timeout)?,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.failed(request, errno)),
            }
        }
        Ok(())
    }

    fn wait(
        &self,
        what: PollFlags,
        request: Request,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<(), FrontendError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            self.close();
            return Err(FrontendError::Timeout { request, waited: timeout });
        }
        let millis = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
        match poll(&mut [PollFd::new(self.socket.as_fd(), what)], PollTimeout::from(millis)) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(self.failed(request, errno)),
        }
    }

    fn failed(&self, request: Request, errno: Errno) -> FrontendError {
        match errno {
            Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN => FrontendError::HungUp { request },
            _ => FrontendError::System { what: "talk to the back-end", source: errno.into() },
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.close();
    }
}
