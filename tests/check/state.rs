//! Faults of the device state (rule D1).

use std::fs::File;
use std::io::{Read, Write};
use std::thread::{self, JoinHandle};

use vhost_migrate::unstable::backend::VhostUserMessage;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StateFault {
    /// Has no state before a ring was started.
    NoStateBeforeStart,
    /// Accepts any state.
    AcceptsAnything,
    /// Drops a loaded state.
    ForgetsState,
    /// Resets the device when it refuses a state.
    ResetsOnRefusal,
    /// Closes the connection when it refuses a state.
    HangsUpOnRefusal,
    /// Refuses all states after it has refused one.
    RefusesAfterRefusal,
    /// Treats invalid directions and phases as saving.
    AcceptsAnyDirection,
    /// Handles no other request until a state has arrived.
    BlocksWhileLoading,
    /// Exits at a state of ones.
    DiesOfOnes,
}

/// A transfer of the device state, inspected on its way.
#[derive(Default)]
pub(crate) struct StateTransfer {
    loads: bool,
    /// True once a state was refused.
    pub(crate) has_refused: bool,
    thread: Option<JoinHandle<Vec<u8>>>,
}

impl StateTransfer {
    /// Handles SET_DEVICE_STATE_FD.
    pub(crate) fn begin(&mut self, fault: StateFault, message: &mut VhostUserMessage) {
        self.loads = message.payload.starts_with(&[1]);
        if fault == StateFault::AcceptsAnyDirection && !matches!(message.payload[..], [0 | 1, 0, 0, 0, 0, 0, 0, 0]) {
            message.payload.fill(0);
        }
        if self.loads && [StateFault::BlocksWhileLoading, StateFault::DiesOfOnes].contains(&fault) {
            let (reader, mut writer) = std::io::pipe().unwrap();
            let mut from = File::from(std::mem::replace(&mut message.fds[0], reader.into()));
            self.thread = Some(thread::spawn(move || {
                let mut state = Vec::new();
                let _ = from.read_to_end(&mut state);
                // The back-end may stop reading early.
                let _ = writer.write_all(&state);
                state
            }));
        }
    }

    /// Returns the complete state.
    pub(crate) fn whole(&mut self) -> Vec<u8> {
        self.thread.take().map_or_else(Vec::new, |thread| thread.join().unwrap())
    }

    /// Returns true if the last transfer was a load.
    pub(crate) fn loads(&self) -> bool {
        self.loads
    }
}
