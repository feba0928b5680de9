//! Transfer of the device state through a pipe (rule D1), and its protection.
//!
//! A transfer has its own thread, so a slow pipe does not block the connection. The thread only moves bytes. The
//! connection's thread saves and loads the state, and loads only a complete one.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam::channel::{Receiver, bounded};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::abi::vhost_user::{
    DEVICE_STATE_LOAD, DEVICE_STATE_PHASE_STOPPED, DEVICE_STATE_SAVE, DeviceStateTransfer, FrontendRequest as Code,
};
use crate::backend::{BackendError, VirtioDevice};
use crate::record::{self, Bytes};
use crate::sys::join::join;
use crate::sys::pipe::{MAX_STATE, WaitLimit, read_all, write_all};

/// Maximum time that CHECK_DEVICE_STATE waits for the end of the transfer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Version of [`Envelope`].
const VERSION: u16 = 1;
const HASH_BYTES: usize = size_of::<u64>();

/// Content of the pipe, as a record. It is followed, in every version, by the xxh3-64 of the record.
#[derive(Serialize, Deserialize)]
struct Envelope {
    /// The kind of device.
    kind: String,
    /// The state of [`VirtioDevice::save_state`].
    state: Bytes,
}

/// A transfer, running or waiting for CHECK_DEVICE_STATE. Dropping it cancels it.
pub(super) struct StateTransfer {
    is_load: bool,
    result: Receiver<io::Result<Vec<u8>>>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl StateTransfer {
    /// Starts the transfer of SET_DEVICE_STATE_FD. A saved state is that of this moment.
    ///
    /// # Errors
    /// [`BackendError::DeviceState`], or the error of the device or the system.
    pub(super) fn begin(
        device: &dyn VirtioDevice,
        transfer: DeviceStateTransfer,
        pipe: OwnedFd,
    ) -> Result<StateTransfer, BackendError> {
        let kind = kind(device)?;
        let DeviceStateTransfer { direction, phase } = transfer;
        if phase != DEVICE_STATE_PHASE_STOPPED {
            return Err(state_error(format!("phase {phase} is not known, only 0 (stopped)")));
        }
        let bytes = match direction {
            DEVICE_STATE_SAVE => Some(encode(kind, device.save_state()?)?),
            DEVICE_STATE_LOAD => None,
            _ => return Err(state_error(format!("direction {direction} is neither save (0) nor load (1)"))),
        };
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(BackendError::system("make an eventfd"))?;
        let (stop, (sender, result)) = (Arc::new(stop), bounded(1));
        let (load, stopped) = (bytes.is_none(), stop.clone());
        let carry = move || {
            let until = WaitLimit::StopFd(stopped.as_fd());
            let moved = match bytes {
                Some(bytes) => write_all(pipe.as_fd(), &bytes, &until).map(|()| Vec::new()),
                None => read_all(pipe.as_fd(), &until),
            };
            // The peer waits for the end of the pipe.
            drop(pipe);
            let _ = sender.send(moved);
        };
        let thread = thread::Builder::new().name("device state".into()).spawn(carry);
        let thread = thread.map_err(BackendError::system("start a thread"))?;
        Ok(StateTransfer { is_load: load, result, stop, thread: Some(thread) })
    }

    /// Completes the transfer. A loaded state then belongs to the device; after an error the device is unchanged.
    ///
    /// # Errors
    /// [`BackendError::DeviceState`] for an incomplete or invalid transfer, or the error of the device.
    pub(super) fn check(self, device: &dyn VirtioDevice) -> Result<(), BackendError> {
        let moved = self.result.recv_timeout(PATIENCE);
        let moved = moved.map_err(|_| state_error("its transfer is not over: close the pipe before you ask".into()))?;
        let bytes = moved.map_err(|error| state_error(format!("the transfer failed: {error}")))?;
        if self.is_load { device.load_state(&decode(kind(device)?, &bytes)?) } else { Ok(()) }
    }
}

impl Drop for StateTransfer {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            join(thread);
        }
    }
}

fn state_error(why: String) -> BackendError {
    BackendError::DeviceState { why }
}

fn kind(device: &dyn VirtioDevice) -> Result<&'static str, BackendError> {
    device.state_kind().ok_or(BackendError::Unsupported { code: Code::SET_DEVICE_STATE_FD })
}

fn encode(kind: &str, state: Vec<u8>) -> Result<Vec<u8>, BackendError> {
    let envelope = Envelope { kind: kind.into(), state: Bytes(state) };
    let mut bytes = record::encode(VERSION, &envelope).map_err(|error| state_error(error.to_string()))?;
    bytes.extend(XxHash3_64::oneshot(&bytes).to_le_bytes());
    match bytes.len() {
        ..=MAX_STATE => Ok(bytes),
        len => Err(state_error(format!("it has {len} bytes, and at most {MAX_STATE} travel"))),
    }
}

fn decode(kind: &str, bytes: &[u8]) -> Result<Vec<u8>, BackendError> {
    let Some((record, hash)) = bytes.split_last_chunk::<HASH_BYTES>() else {
        return Err(state_error(format!("{} bytes came, which is none", bytes.len())));
    };
    if XxHash3_64::oneshot(record) != u64::from_le_bytes(*hash) {
        return Err(state_error("it was cut short or changed on its way".into()));
    }
    let envelope = record::decode::<Envelope>("device state", VERSION, record, MAX_STATE);
    let Envelope { kind: theirs, state } = envelope.map_err(|error| state_error(error.to_string()))?;
    match theirs == kind {
        true => Ok(state.0),
        false => Err(state_error(format!("it is of {theirs:?}, and this is {kind:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_encoded_state_is_decoded_intact_and_other_bytes_are_refused() {
        let state: Vec<u8> = (0..200).collect();
        let bytes = encode("net", state.clone()).unwrap();
        assert_eq!(decode("net", &bytes).unwrap(), state);
        let why = |kind, bytes: &[u8]| decode(kind, bytes).unwrap_err().to_string();
        assert!(why("disk", &bytes).contains("it is of \"net\", and this is \"disk\""));
        for end in 0..bytes.len() {
            why("net", &bytes[..end]);
        }
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            why("net", &bytes);
        }
        why("net", &[&bytes[..], &[0]].concat());
    }

    #[test]
    fn a_state_of_a_newer_version_is_refused_with_advice_to_update() {
        let mut bytes = encode("net", vec![1]).unwrap();
        bytes.truncate(bytes.len() - HASH_BYTES);
        bytes[0] = 2;
        bytes.extend(XxHash3_64::oneshot(&bytes).to_le_bytes());
        let why = decode("net", &bytes).unwrap_err().to_string();
        assert!(why.contains("received device state version 2") && why.contains("update this program"), "{why}");
    }

    #[test]
    fn a_state_above_the_size_limit_is_refused() {
        assert!(encode("net", vec![0; MAX_STATE - 64]).is_ok());
        assert!(encode("net", vec![0; MAX_STATE]).is_err());
    }
}
