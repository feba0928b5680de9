//! Waiting, within a limit, for threads that have been asked to end.
#![forbid(unsafe_code)]

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::error;

/// Longest wait for a thread that only has to notice that it was asked to end.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between looks at the thread.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// Waits for a thread that has been asked to end and has no work to finish.
///
/// A thread that does not end within 10 s is left behind: a peer that holds a kernel lock on a shared file can block
/// that thread, and must not block the others.
pub(crate) fn join(thread: JoinHandle<()>) {
    join_within(thread, JOIN_TIMEOUT);
}

fn join_within(thread: JoinHandle<()>, limit: Duration) {
    let deadline = Instant::now() + limit;
    while !thread.is_finished() {
        if Instant::now() >= deadline {
            let name = thread.thread().name().unwrap_or("without a name");
            return error!("thread {name:?} has not ended within {} s: left running", limit.as_secs_f64());
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    // The panic hook has already reported a panic.
    let _ = thread.join();
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn join_waits_for_a_thread_that_ends_and_leaves_one_that_does_not_behind() {
        let (release, held) = channel::<()>();
        let (ended, has_ended) = channel();
        let thread = std::thread::spawn(move || _ = held.recv().or(ended.send(())));
        join_within(thread, Duration::from_millis(20));
        assert!(has_ended.try_recv().is_err());
        drop(release);
        has_ended.recv_timeout(JOIN_TIMEOUT).unwrap();
        let (ended, has_ended) = channel();
        join(std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            let _ = ended.send(());
        }));
        has_ended.try_recv().unwrap();
    }
}
