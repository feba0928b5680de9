//! SIGINT and SIGTERM as an event on a thread, without a signal handler.

use std::io;

use nix::sys::signal::{SigSet, Signal};

/// Has `then` called on a thread of its own at the first SIGINT or SIGTERM. Call before other threads are started:
/// they inherit the blocked signals.
///
/// # Errors
/// What the system says.
pub(crate) fn on_interrupt(then: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        if signals.wait().is_ok() {
            then();
        }
    })?;
    Ok(())
}
