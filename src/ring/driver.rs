//! The driver's side of a ring, split or packed.

use crate::memory::Memory;

use super::{Buffer, PackedDriver, PackedDriverState, RingError, RingLayout, SplitDriver, SplitDriverState};

/// A completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct UsedBuffer {
    /// What adding it returned: the head descriptor, or the buffer id.
    pub head: u16,
    /// Bytes the device says it wrote. Not checked against the buffers.
    pub len: u32,
}

/// Where a driver is in its ring.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum DriverRingState {
    /// Of a split ring.
    Split(SplitDriverState),
    /// Of a packed ring.
    Packed(PackedDriverState),
}

/// A ring as its driver uses it: [`SplitDriver`] or [`PackedDriver`], which say what the functions do.
pub enum DriverRing {
    /// A split ring.
    Split(SplitDriver),
    /// A packed ring.
    Packed(PackedDriver),
}

impl DriverRing {
    /// Makes an empty ring.
    ///
    /// # Errors
    /// As [`SplitDriver::new`] and [`PackedDriver::new`].
    pub fn new(memory: &Memory, layout: RingLayout, features: u64) -> Result<DriverRing, RingError> {
        Ok(match layout {
            RingLayout::Split(layout) => DriverRing::Split(SplitDriver::new(memory, layout, features)?),
            RingLayout::Packed(layout) => DriverRing::Packed(PackedDriver::new(memory, layout, features)?),
        })
    }

    /// Goes on with a ring where `state` left it.
    ///
    /// # Errors
    /// As [`SplitDriver::restore`] and [`PackedDriver::restore`]; a state of the other kind of ring.
    pub fn restore(
        memory: &Memory,
        layout: RingLayout,
        features: u64,
        state: &DriverRingState,
    ) -> Result<DriverRing, RingError> {
        Ok(match (layout, state) {
            (RingLayout::Split(layout), DriverRingState::Split(state)) => {
                DriverRing::Split(SplitDriver::restore(memory, layout, features, state)?)
            }
            (RingLayout::Packed(layout), DriverRingState::Packed(state)) => {
                DriverRing::Packed(PackedDriver::restore(memory, layout, features, state)?)
            }
            _ => return Err(RingError::State { fault: "it is of the other kind of ring, split or packed" }),
        })
    }

    /// What [`DriverRing::restore`] needs to go on.
    pub fn state(&self) -> DriverRingState {
        match self {
            DriverRing::Split(ring) => DriverRingState::Split(ring.state()),
            DriverRing::Packed(ring) => DriverRingState::Packed(ring.state()),
        }
    }

    /// Adds a request and returns what names it, or `None` while the ring is too full for it.
    ///
    /// # Errors
    /// A request that has no buffer or could never fit; a `table` outside guest memory.
    pub fn add(
        &mut self,
        readable: &[Buffer],
        writable: &[Buffer],
        table: Option<u64>,
    ) -> Result<Option<u16>, RingError> {
        match self {
            DriverRing::Split(ring) => ring.add(readable, writable, table),
            DriverRing::Packed(ring) => ring.add(readable, writable, table),
        }
    }

    /// Makes the requests added so far visible; true if the device is to be kicked.
    #[must_use = "the device may be waiting for a kick"]
    pub fn publish(&mut self) -> bool {
        match self {
            DriverRing::Split(ring) => ring.publish(),
            DriverRing::Packed(ring) => ring.publish(),
        }
    }

    /// Takes the next completion, if there is one.
    ///
    /// # Errors
    /// The device broke the ring; nothing was taken.
    pub fn pop_used(&mut self) -> Result<Option<UsedBuffer>, RingError> {
        match self {
            DriverRing::Split(ring) => ring.pop_used(),
            DriverRing::Packed(ring) => ring.pop_used(),
        }
    }

    /// Asks the device not to notify.
    pub fn disable_notifications(&mut self) {
        match self {
            DriverRing::Split(ring) => ring.disable_notifications(),
            DriverRing::Packed(ring) => ring.disable_notifications(),
        }
    }

    /// Asks the device to notify; true if there are completions already.
    #[must_use = "completions that are there already bring no notification"]
    pub fn enable_notifications(&mut self) -> bool {
        match self {
            DriverRing::Split(ring) => ring.enable_notifications(),
            DriverRing::Packed(ring) => ring.enable_notifications(),
        }
    }

    /// Requests without a completion.
    pub fn outstanding(&self) -> u16 {
        match self {
            DriverRing::Split(ring) => ring.outstanding(),
            DriverRing::Packed(ring) => ring.outstanding(),
        }
    }

    /// Descriptors that are free.
    pub fn free(&self) -> u16 {
        match self {
            DriverRing::Split(ring) => ring.free(),
            DriverRing::Packed(ring) => ring.free(),
        }
    }
}
