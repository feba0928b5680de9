//! The message loop: reads the kernel's messages, and answers those whose action takes too long (rule V1.6).
//!
//! The actions are performed by another thread, which answers. A message is answered once: whichever thread
//! [claims](Message::claim) it first writes the response.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::error;

use crate::abi::vduse::{
    DevRequest, VDUSE_GET_VQ_STATE, VDUSE_SET_STATUS, VDUSE_SET_VQ_READY, VDUSE_SUSPEND, VDUSE_UPDATE_IOTLB,
};
use crate::vduse::files::DeviceFile;
use crate::vduse::state::response;

/// Maximum number of messages that wait. The kernel sends the next one after the response, unless the driver and a
/// management tool act at the same time.
const MAX_WAITING: usize = 64;

/// A task of the thread that controls the rings.
#[derive(Debug)]
pub(super) enum Task {
    Message(Arc<Message>),
    ConfigChanged,
    /// Stop the rings and end.
    Stop,
}

/// A message of the kernel.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) request: DevRequest,
    claimed: AtomicBool,
    done: AtomicBool,
}

impl Message {
    fn new(request: DevRequest) -> Message {
        Message { request, claimed: AtomicBool::new(false), done: AtomicBool::new(false) }
    }

    /// Returns true for the one caller that is to answer.
    pub(super) fn claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::AcqRel)
    }

    /// Returns true if the message is answered, or is about to be.
    pub(super) fn is_claimed(&self) -> bool {
        self.claimed.load(Ordering::Acquire)
    }

    /// Marks the action of the message as ended.
    pub(super) fn set_done(&self) {
        self.done.store(true, Ordering::Release);
    }

    fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }
}

/// The reason for which the loop has ended.
#[derive(Debug)]
pub(super) enum LoopEnd {
    Stopped,
    /// The kernel has given up the device.
    Broken,
    Failed(io::Error),
}

/// Reads messages until `stop` is readable. A message that is not answered within `limit` is refused, and so is each one
/// after it until its action has ended.
pub(super) fn serve_messages(
    name: &str,
    file: &DeviceFile,
    stop: BorrowedFd<'_>,
    limit: Option<Duration>,
    tasks: &Sender<Task>,
) -> LoopEnd {
    let mut waiting: Vec<(Arc<Message>, Instant)> = Vec::new();
    loop {
        waiting.retain(|(message, _)| !message.is_done());
        let next = limit.and_then(|limit| {
            let open = waiting.iter().filter(|(message, _)| !message.is_claimed());
            open.map(|(_, since)| (*since + limit).saturating_duration_since(Instant::now())).min()
        });
        // Rounded up, so that the time has passed when the wait ends.
        let timeout = next.map(|left| PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX));
        let mut fds = [PollFd::new(stop, PollFlags::POLLIN), PollFd::new(file.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout.unwrap_or(PollTimeout::NONE)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return LoopEnd::Failed(errno.into()),
        }
        let [stopped, device] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        if !stopped.is_empty() {
            return LoopEnd::Stopped;
        }
        if device.intersects(PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL) {
            return LoopEnd::Broken;
        }
        for (message, since) in &waiting {
            if limit.is_some_and(|limit| since.elapsed() >= limit) && message.claim() {
                error!(
                    "{name}: {} is refused after {} s, because requests are still under way (rule V1.6)",
                    title(message.request.kind),
                    since.elapsed().as_secs()
                );
                if let Err(error) = file.write(&response(&message.request, false)) {
                    return LoopEnd::Failed(error);
                }
            }
        }
        while let Some(request) = match file.read() {
            Ok(request) => request,
            Err(error) => return LoopEnd::Failed(error),
        } {
            // An action that is overdue holds up those of later messages.
            if is_overdue(&waiting, limit) || waiting.len() >= MAX_WAITING {
                if let Err(error) = file.write(&response(&request, false)) {
                    return LoopEnd::Failed(error);
                }
                continue;
            }
            let message = Arc::new(Message::new(request));
            waiting.push((message.clone(), Instant::now()));
            if tasks.send(Task::Message(message)).is_err() {
                return LoopEnd::Stopped;
            }
        }
    }
}

/// Returns true if the action of any message takes longer than `limit`.
fn is_overdue(waiting: &[(Arc<Message>, Instant)], limit: Option<Duration>) -> bool {
    let is_late = |(message, since): &(Arc<Message>, Instant)| {
        !message.is_done() && limit.is_some_and(|limit| since.elapsed() >= limit)
    };
    waiting.iter().any(is_late)
}

/// Returns the name of a message.
pub(super) fn title(kind: u32) -> String {
    match kind {
        VDUSE_GET_VQ_STATE => "GET_VQ_STATE".into(),
        VDUSE_SET_STATUS => "SET_STATUS".into(),
        VDUSE_UPDATE_IOTLB => "UPDATE_IOTLB".into(),
        VDUSE_SET_VQ_READY => "SET_VQ_READY".into(),
        VDUSE_SUSPEND => "SUSPEND".into(),
        _ => format!("message {kind}"),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use crossbeam::channel::{Receiver, unbounded};
    use nix::sys::eventfd::EventFd;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use zerocopy::{FromBytes, FromZeros, IntoBytes};

    use super::*;
    use crate::abi::vduse::{DevResponse, VDUSE_REQ_RESULT_FAILED};

    const LIMIT: Duration = Duration::from_millis(50);

    /// The kernel's side of the file, and the tasks that the loop gives.
    struct Kernel(DeviceFile, Receiver<Task>);

    impl Kernel {
        fn send(&self, request_id: u32) {
            let request = DevRequest { kind: VDUSE_SET_STATUS, request_id, ..DevRequest::new_zeroed() };
            // Both are of one size.
            self.0.write(&DevResponse::read_from_bytes(request.as_bytes()).unwrap()).unwrap();
        }

        /// Waits for a response, and returns its id and result.
        fn response(&self) -> (u32, u32) {
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            assert_eq!(poll(&mut fds, 60_000_u16), Ok(1), "a response");
            let read = self.0.read().unwrap().unwrap();
            let response = DevResponse::read_from_bytes(read.as_bytes()).unwrap();
            (response.request_id, response.result)
        }

        fn message(&self) -> Arc<Message> {
            let Task::Message(message) = self.1.recv_timeout(Duration::from_secs(60)).unwrap() else {
                panic!("a message")
            };
            message
        }
    }

    /// Runs the loop while `test` plays the kernel and the thread of the rings.
    fn with_loop(limit: Option<Duration>, test: impl FnOnce(Kernel)) -> LoopEnd {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (kernel, device) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let (kernel, device) = (DeviceFile::from(kernel), DeviceFile::from(device));
        let stop = EventFd::new().unwrap();
        let (tasks, inbox) = unbounded();
        thread::scope(|scope| {
            let served = scope.spawn(|| serve_messages("test", &device, stop.as_fd(), limit, &tasks));
            test(Kernel(kernel, inbox));
            // The end of the peer is that of the loop.
            served.join().unwrap()
        })
    }

    /// Rule V1.6: a queue that drains for long makes no answer late, neither of this message nor of the next.
    #[test]
    fn a_message_whose_action_takes_too_long_is_refused_in_time() {
        with_loop(Some(LIMIT), |kernel| {
            kernel.send(1);
            let slow = kernel.message();
            assert_eq!(kernel.response(), (1, VDUSE_REQ_RESULT_FAILED));
            assert!(!slow.claim(), "it is answered once");
            kernel.send(2);
            assert_eq!(kernel.response(), (2, VDUSE_REQ_RESULT_FAILED));
            assert!(kernel.1.try_recv().is_err(), "its action would wait, too");
            // From here on messages are performed again.
            slow.set_done();
            kernel.send(3);
            assert!(kernel.message().claim());
        });
    }

    #[test]
    fn the_loop_ends_when_the_kernel_has_given_up_the_device() {
        assert!(matches!(with_loop(None, drop), LoopEnd::Broken));
    }
}
