//! Signals as events on threads, without signal handlers.
//!
//! All functions must be called before other threads are started, so that those inherit the blocked signals.

use std::io;
use std::ops::ControlFlow;
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow, Signal, raise};

/// Calls `then` on a separate thread at the first SIGINT or SIGTERM.
///
/// # Errors
/// The error of the system.
pub(crate) fn on_interrupt(then: impl FnOnce() + Send + 'static) -> io::Result<()> {
    on_first_signal([Signal::SIGINT, Signal::SIGTERM], then)
}

/// Calls `then` on a separate thread at the first SIGINT, SIGTERM or, unless it was ignored at the start of the process
/// (nohup), SIGHUP.
///
/// # Errors
/// The error of the system.
pub(crate) fn on_interrupt_or_hangup(then: impl FnOnce() + Send + 'static) -> io::Result<()> {
    on_first_signal(interrupts_and_hangup(), then)
}

/// Returns the signals that end a process bound to its terminal: SIGINT, SIGTERM and, unless it was ignored at the
/// start of the process (nohup), SIGHUP.
pub(crate) fn interrupts_and_hangup() -> Vec<Signal> {
    let hangup = (!is_ignored(Signal::SIGHUP)).then_some(Signal::SIGHUP);
    [Signal::SIGINT, Signal::SIGTERM].into_iter().chain(hangup).collect()
}

/// Calls `before` with the first of `signals` that arrives, waits for it for at most `limit`, and then lets the signal
/// end the process.
///
/// # Errors
/// The error of the system.
pub(crate) fn before_termination(
    signals: impl IntoIterator<Item = Signal>,
    limit: Duration,
    before: impl FnOnce(Signal) + Send + 'static,
) -> io::Result<()> {
    let mut before = Some(before);
    on_signals(signals, move |signal| {
        let (done, is_done) = crossbeam::channel::bounded(1);
        if let Some(before) = before.take() {
            let work = move || {
                before(signal);
                let _ = done.send(());
            };
            // The call is skipped if no thread can be started.
            if std::thread::Builder::new().spawn(work).is_ok() {
                let _ = is_done.recv_timeout(limit);
            }
        }
        let _ = SigSet::from(signal).thread_unblock().and_then(|()| raise(signal));
        // The process is still running, because the signal was ignored when it was started.
        std::process::exit(128 + signal as i32)
    })
}

/// Returns true if the signal was ignored when this process was started; false if unknown.
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_some_and(|ignored| ignored >> (signal as i32 - 1) & 1 != 0)
}

/// Ignores SIGHUP in this process. Child processes handle it as usual.
///
/// # Errors
/// The error of the system.
pub(crate) fn ignore_hangup() -> io::Result<()> {
    Ok(SigSet::from(Signal::SIGHUP).thread_block()?)
}

/// Makes a write beyond the file size limit (`ulimit -f`) fail instead of ending this process by SIGXFSZ. Child
/// processes handle the signal as usual.
///
/// # Errors
/// The error of the system.
pub(crate) fn block_file_size_signal() -> io::Result<()> {
    Ok(SigSet::from(Signal::SIGXFSZ).thread_block()?)
}

fn on_first_signal(signals: impl IntoIterator<Item = Signal>, then: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let mut then = Some(then);
    on_signals(signals, move |_| {
        then.take().map_or(ControlFlow::Continue(()), |then| {
            then();
            ControlFlow::Break(())
        })
    })
}

/// Calls `then` on a separate thread at every SIGINT and SIGTERM, with the number of these signals so far, including
/// the current one.
///
/// # Errors
/// The error of the system.
pub(crate) fn on_every_interrupt(mut then: impl FnMut(u32) + Send + 'static) -> io::Result<()> {
    let mut count = 0u32;
    on_signals([Signal::SIGINT, Signal::SIGTERM], move |_| {
        count = count.saturating_add(1);
        then(count);
        ControlFlow::Continue(())
    })
}

/// Calls `then` on a separate thread at every SIGHUP.
///
/// # Errors
/// The error of the system.
pub(crate) fn on_hangup(mut then: impl FnMut() + Send + 'static) -> io::Result<()> {
    on_signals([Signal::SIGHUP], move |_| {
        then();
        ControlFlow::Continue(())
    })
}

fn on_signals(
    signals: impl IntoIterator<Item = Signal>,
    mut then: impl FnMut(Signal) -> ControlFlow<()> + Send + 'static,
) -> io::Result<()> {
    let signals: SigSet = signals.into_iter().collect();
    // Other signals, which may be ignored or awaited elsewhere, are never delivered to the new thread.
    let mut mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let wait = move || while signals.wait().is_ok_and(|signal| then(signal).is_continue()) {};
    let started = std::thread::Builder::new().name("signals".into()).spawn(wait);
    mask.extend(&signals);
    mask.thread_set_mask()?;
    started?;
    Ok(())
}
