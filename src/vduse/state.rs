//! The state of a VDUSE device as its messages set it, without files and threads.
//!
//! [`DeviceState::begin`] decodes a message and returns the action that it requires. The server performs the action and
//! reports the result to [`DeviceState::finish`], which changes the state and returns the response.

#![forbid(unsafe_code)]

use std::ops::RangeInclusive;

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::abi::vduse::{
    DevRequest, DevResponse, DevStatus, IovaRange, VDUSE_GET_VQ_STATE, VDUSE_REQ_RESULT_FAILED, VDUSE_REQ_RESULT_OK,
    VDUSE_SET_STATUS, VDUSE_SET_VQ_READY, VDUSE_SUSPEND, VDUSE_UPDATE_IOTLB, VqReady, VqState, VqStatePacked,
    VqStateSplit,
};
use crate::abi::virtio::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_F_RING_PACKED,
    VirtioFeatures,
};
use crate::memory::Iova;
use crate::ring::{Position, RingBase};

/// The action that a message requires before it is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// None.
    None,
    /// Compare the features of the driver with the offered ones.
    CheckFeatures,
    /// Read the features of the driver, and start the rings that are enabled.
    StartRings,
    /// Complete and publish all requests, and stop the rings.
    StopRings,
    /// As [`Action::StopRings`]; then drop all mappings and the settings of the driver.
    Reset,
    /// Start one ring.
    StartRing(u16),
    /// Stop one ring.
    StopRing(u16),
    /// Stop one ring and return its base.
    RingBase(u16),
    /// Drop the mappings of these addresses, once no request uses them.
    Invalidate(RangeInclusive<Iova>),
}

/// The result of an action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It was performed.
    Done,
    /// The base of the ring, with the features of its driver.
    Base(RingBase, VirtioFeatures),
    /// It failed.
    Failed,
}

/// A message that cannot be decoded, or that is not valid in the state of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum MessageError {
    #[error("message of unknown kind {kind}")]
    UnknownKind { kind: u32 },
    #[error("message of kind {kind} about ring {index}: the device has {queues}")]
    NoSuchRing { kind: u32, index: u32, queues: u16 },
    #[error("mappings {start:#x} to {last:#x}: the range ends before it starts")]
    Range { start: u64, last: u64 },
}

/// The status of the device, and whether its rings are to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DeviceState {
    queues: u16,
    status: u8,
    suspended: bool,
}

impl DeviceState {
    /// Creates the state of a device without a driver.
    pub(super) fn new(queues: u16) -> DeviceState {
        DeviceState { queues, status: 0, suspended: false }
    }

    /// Creates the state of a device that another process has served until now.
    pub(super) fn taken_over(queues: u16, status: u8, suspended: bool) -> DeviceState {
        DeviceState { queues, status, suspended }
    }

    /// Returns the device status.
    pub(super) fn status(&self) -> u8 {
        self.status
    }

    /// Returns true if the kernel has suspended the device.
    pub(super) fn is_suspended(&self) -> bool {
        self.suspended
    }

    /// Returns true if enabled rings are to run.
    pub(super) fn runs(&self) -> bool {
        runs(self.status) && !self.suspended
    }

    /// Decodes a message.
    ///
    /// # Errors
    /// [`MessageError`] for a message to be refused.
    pub(super) fn begin(&self, request: &DevRequest) -> Result<Action, MessageError> {
        let kind = request.kind;
        match kind {
            VDUSE_GET_VQ_STATE => self.ring(kind, payload::<VqState>(request).index).map(Action::RingBase),
            VDUSE_SET_STATUS => Ok(self.on_status(payload::<DevStatus>(request).status)),
            VDUSE_UPDATE_IOTLB => {
                let IovaRange { start, last } = payload(request);
                if start > last {
                    return Err(MessageError::Range { start, last });
                }
                Ok(Action::Invalidate(Iova(start)..=Iova(last)))
            }
            VDUSE_SET_VQ_READY => {
                let VqReady { index, ready } = payload(request);
                let index = self.ring(kind, index)?;
                Ok(match ready {
                    0 => Action::StopRing(index),
                    // Rings that are enabled before DRIVER_OK start with it.
                    _ if self.runs() => Action::StartRing(index),
                    _ => Action::None,
                })
            }
            VDUSE_SUSPEND => Ok(Action::StopRings),
            _ => Err(MessageError::UnknownKind { kind }),
        }
    }

    fn ring(&self, kind: u32, index: u32) -> Result<u16, MessageError> {
        let refused = MessageError::NoSuchRing { kind, index, queues: self.queues };
        u16::try_from(index).ok().filter(|index| *index < self.queues).ok_or(refused)
    }

    fn on_status(&self, status: u8) -> Action {
        let is_new = |bit| status & !self.status & bit != 0;
        match status {
            0 => Action::Reset,
            _ if runs(status) && !runs(self.status) => Action::StartRings,
            _ if !runs(status) && runs(self.status) => Action::StopRings,
            _ if is_new(VIRTIO_CONFIG_S_FEATURES_OK) => Action::CheckFeatures,
            _ => Action::None,
        }
    }

    /// Changes the state after the action of a message, unless that has failed. Returns the response.
    pub(super) fn finish(&mut self, request: &DevRequest, outcome: Outcome) -> DevResponse {
        let mut response = response(request, outcome != Outcome::Failed);
        match (request.kind, outcome) {
            (_, Outcome::Failed) => {}
            (VDUSE_SET_STATUS, _) => {
                self.status = payload::<DevStatus>(request).status;
                self.suspended &= self.status != 0;
            }
            (VDUSE_SUSPEND, _) => self.suspended = true,
            (VDUSE_GET_VQ_STATE, Outcome::Base(base, features)) => {
                let state = VqState { index: payload::<VqState>(request).index, state: to_state(base, features) };
                let _ = state.write_to_prefix(&mut response.payload);
            }
            _ => {}
        }
        response
    }
}

/// Returns the response to a message without a result of its own.
pub(super) fn response(request: &DevRequest, ok: bool) -> DevResponse {
    let result = if ok { VDUSE_REQ_RESULT_OK } else { VDUSE_REQ_RESULT_FAILED };
    DevResponse { request_id: request.request_id, result, ..DevResponse::new_zeroed() }
}

/// Returns true if rings run with this status.
fn runs(status: u8) -> bool {
    status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED) == VIRTIO_CONFIG_S_DRIVER_OK
}

/// Decodes the payload, which is larger than any of its structures.
fn payload<T: FromBytes + FromZeros>(request: &DevRequest) -> T {
    T::read_from_prefix(&request.payload).map_or_else(|_| T::new_zeroed(), |(payload, _)| payload)
}

/// Returns the base of a ring in the kernel's form.
pub(super) fn to_state(base: RingBase, features: VirtioFeatures) -> VqStatePacked {
    if !features.contains(VIRTIO_F_RING_PACKED) {
        return VqStatePacked::from_split(VqStateSplit { avail_index: base.split_index() });
    }
    let (avail, used) = base.packed_positions();
    VqStatePacked {
        last_avail_counter: avail.wrap.into(),
        last_avail_idx: avail.index,
        last_used_counter: used.wrap.into(),
        last_used_idx: used.index,
    }
}

/// Returns the base of a ring from the kernel's form.
pub(super) fn from_state(state: VqStatePacked, features: VirtioFeatures) -> RingBase {
    if !features.contains(VIRTIO_F_RING_PACKED) {
        return RingBase::split(state.as_split().avail_index);
    }
    let position = |index: u16, counter: u16| Position { index: index & 0x7fff, wrap: counter & 1 != 0 };
    let avail = position(state.last_avail_idx, state.last_avail_counter);
    let used = position(state.last_used_idx, state.last_used_counter);
    RingBase::packed(avail.index, avail.wrap, used.index, used.wrap)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;
    use zerocopy::Immutable;

    use super::*;
    use crate::abi::virtio::{VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER};

    const FEATURES_OK: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
    const DRIVER_OK: u8 = FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK;

    fn request(kind: u32, payload: &(impl IntoBytes + Immutable)) -> DevRequest {
        let mut request = DevRequest { kind, request_id: 7, ..DevRequest::new_zeroed() };
        payload.write_to_prefix(&mut request.payload).unwrap();
        request
    }

    fn status(status: u8) -> DevRequest {
        request(VDUSE_SET_STATUS, &DevStatus { status })
    }

    /// A device with two rings, and what its messages require.
    struct Device(DeviceState);

    impl Device {
        fn on(&mut self, request: &DevRequest) -> Result<Action, MessageError> {
            let action = self.0.begin(request)?;
            let response = self.0.finish(request, Outcome::Done);
            assert_eq!((response.request_id, response.result), (7, VDUSE_REQ_RESULT_OK));
            Ok(action)
        }

        fn started() -> Device {
            let mut device = Device(DeviceState::new(2));
            device.on(&status(DRIVER_OK)).unwrap();
            device
        }
    }

    /// Rule V1.2.
    #[test]
    fn rings_run_from_driver_ok_to_the_reset() {
        let mut device = Device(DeviceState::new(2));
        let expected = [
            (0, Action::Reset),
            (VIRTIO_CONFIG_S_ACKNOWLEDGE, Action::None),
            (FEATURES_OK, Action::CheckFeatures),
            (DRIVER_OK, Action::StartRings),
            (DRIVER_OK, Action::None),
            (DRIVER_OK | VIRTIO_CONFIG_S_FAILED, Action::StopRings),
            (0, Action::Reset),
        ];
        for (value, action) in expected {
            assert_eq!(device.on(&status(value)), Ok(action), "{value:#x}");
            assert_eq!(device.0.runs(), value == DRIVER_OK);
        }
    }

    #[test]
    fn a_status_that_failed_is_not_taken_over() {
        let mut device = DeviceState::new(2);
        let response = device.finish(&status(DRIVER_OK), Outcome::Failed);
        assert_eq!(response.result, VDUSE_REQ_RESULT_FAILED);
        assert!(!device.runs());
    }

    /// Rule V2.4.
    #[test]
    fn a_ring_that_is_enabled_late_starts_and_a_suspended_device_starts_none() {
        let mut device = Device::started();
        let ready = |ready| request(VDUSE_SET_VQ_READY, &VqReady { index: 1, ready });
        assert_eq!(device.on(&ready(1)), Ok(Action::StartRing(1)));
        assert_eq!(device.on(&ready(0)), Ok(Action::StopRing(1)));
        assert_eq!(device.on(&request(VDUSE_SUSPEND, &0_u8)), Ok(Action::StopRings));
        assert_eq!(device.on(&ready(1)), Ok(Action::None));
        // A reset ends it.
        device.on(&status(0)).unwrap();
        assert_eq!(device.on(&status(DRIVER_OK)), Ok(Action::StartRings));
        assert!(device.0.runs());
    }

    /// Rule V4.2.
    #[rstest]
    #[case::split(VirtioFeatures::empty(), RingBase::split(0xfffe))]
    #[case::packed(VIRTIO_F_RING_PACKED, RingBase::packed(5, false, 3, true))]
    fn the_base_is_answered_in_the_form_of_the_ring(#[case] features: VirtioFeatures, #[case] base: RingBase) {
        let mut device = Device::started();
        let asked = request(VDUSE_GET_VQ_STATE, &VqState { index: 1, ..VqState::new_zeroed() });
        assert_eq!(device.0.begin(&asked), Ok(Action::RingBase(1)));
        let response = device.0.finish(&asked, Outcome::Base(base, features));
        let (state, _) = VqState::read_from_prefix(&response.payload).unwrap();
        assert_eq!((response.result, state.index), (VDUSE_REQ_RESULT_OK, 1));
        assert_eq!(from_state(state.state, features), base);
    }

    /// Rule V1.7.
    #[test]
    fn what_cannot_be_decoded_is_refused() {
        let mut device = Device::started();
        let ring = |index| request(VDUSE_GET_VQ_STATE, &VqState { index, ..VqState::new_zeroed() });
        let refused = |index| MessageError::NoSuchRing { kind: VDUSE_GET_VQ_STATE, index, queues: 2 };
        assert_eq!(device.on(&ring(2)), Err(refused(2)));
        assert_eq!(device.on(&ring(0x1_0000)), Err(refused(0x1_0000)));
        assert_eq!(device.on(&request(99, &0_u8)), Err(MessageError::UnknownKind { kind: 99 }));
        let backwards = request(VDUSE_UPDATE_IOTLB, &IovaRange { start: 2, last: 1 });
        assert_eq!(device.on(&backwards), Err(MessageError::Range { start: 2, last: 1 }));
        let range = request(VDUSE_UPDATE_IOTLB, &IovaRange { start: 1, last: 2 });
        assert_eq!(device.on(&range), Ok(Action::Invalidate(Iova(1)..=Iova(2))));
    }
}
