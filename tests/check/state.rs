//! What a back-end can do wrong with the state of its device (rule D1).

use std::fs::File;
use std::io::{Read, Write};
use std::thread::{self, JoinHandle};

use vhost_migrate::backend::VhostUserMessage;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum StateFault {
    /// A device that never ran has none.
    NoStateBeforeStart,
    /// Whatever comes is fine.
    AcceptsAnything,
    /// What was loaded is forgotten.
    ForgetsState,
    /// What is refused resets the device.
    ResetsOnRefusal,
    /// What is refused ends the connection.
    HangsUpOnRefusal,
    /// After one that is refused no other is taken.
    RefusesAfterRefusal,
    /// Whatever direction and phase there are not, it saves.
    AcceptsAnyDirection,
    /// Nothing else is done until all of a state has come.
    BlocksWhileLoading,
    /// A state of ones ends the process.
    DiesOfOnes,
}

/// A state that comes to be loaded, looked at on its way.
#[derive(Default)]
pub(crate) struct StateTransfer {
    loads: bool,
    /// One was refused.
    pub(crate) spoilt: bool,
    thread: Option<JoinHandle<Vec<u8>>>,
}

impl StateTransfer {
    /// SET_DEVICE_STATE_FD.
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
                // Who has seen enough need not read on.
                let _ = writer.write_all(&state);
                state
            }));
        }
    }

    /// What has come, when all has.
    pub(crate) fn whole(&mut self) -> Vec<u8> {
        self.thread.take().map_or_else(Vec::new, |thread| thread.join().unwrap())
    }

    /// Whether one came last.
    pub(crate) fn loads(&self) -> bool {
        self.loads
    }
}
