//! Threads that have been told to end, waited for within a limit.
#![forbid(unsafe_code)]

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tracing::error;

/// How long a thread may take that only has to look up.
const LIMIT: Duration = Duration::from_secs(10);
/// How often to look at it.
const NAP: Duration = Duration::from_micros(200);

/// Waits for a thread that has been told to end and has nothing to finish. One that does not is left behind: a peer that
/// keeps a lock of the kernel's on a file that it shares must not stop the others.
pub(crate) fn join(thread: JoinHandle<()>) {
    join_within(thread, LIMIT);
}

fn join_within(thread: JoinHandle<()>, limit: Duration) {
    let deadline = Instant::now() + limit;
    while !thread.is_finished() {
        if Instant::now() >= deadline {
            let name = thread.thread().name().unwrap_or("without a name");
            return error!("the thread {name:?} has not ended within {} s and is left behind", limit.as_secs_f64());
        }
        std::thread::sleep(NAP);
    }
    // A panic was reported when it happened.
    let _ = thread.join();
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_thread_that_does_not_end_is_left_behind_and_one_that_ends_is_waited_for() {
        let (release, held) = channel::<()>();
        let (ended, has_ended) = channel();
        let thread = std::thread::spawn(move || _ = held.recv().or(ended.send(())));
        join_within(thread, Duration::from_millis(20));
        assert!(has_ended.try_recv().is_err());
        drop(release);
        has_ended.recv_timeout(LIMIT).unwrap();
        let (ended, has_ended) = channel();
        join(std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            let _ = ended.send(());
        }));
        has_ended.try_recv().unwrap();
    }
}
