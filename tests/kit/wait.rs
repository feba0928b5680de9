//! Waiting with a time limit.
#![allow(dead_code)] // not every test binary uses all of it

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Time limit of waits. It is generous, because it only determines how late a failure is seen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Waits until `look` returns a value.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until `condition` is true.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    wait_for(what, || condition().then_some(()));
}

/// Returns true if an fd is readable, or becomes so before the timeout.
pub(crate) fn is_readable(fd: &impl AsFd, timeout: impl Into<PollTimeout>) -> bool {
    poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout.into()) == Ok(1)
}
