//! The driver side of a ring of either kind. The work is done in `split` and `packed`.

use crate::memory::Memory;

use super::{Buffer, PackedDriver, PackedDriverState, RingError, RingLayout, SplitDriver, SplitDriverState};

/// A completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct UsedBuffer {
    /// Name of the request as returned by `add`: the head descriptor, or the buffer id.
    pub head: u16,
    /// Number of bytes that the device says it wrote. It is not checked against the buffers.
    pub len: u32,
}

/// The saved state of a ring's driver side.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum DriverRingState {
    /// State on a split ring.
    Split(SplitDriverState),
    /// State on a packed ring.
    Packed(PackedDriverState),
}

/// The driver side of a ring. The methods are those of [`SplitDriver`] and [`PackedDriver`] and are documented there.
pub enum DriverRing {
    /// A split ring.
    Split(SplitDriver),
    /// A packed ring.
    Packed(PackedDriver),
}

impl DriverRing {
    /// Initialises an empty ring.
    ///
    /// # Errors
    /// As [`SplitDriver::new`] and [`PackedDriver::new`].
    pub fn new(memory: &Memory, layout: RingLayout, features: u64) -> Result<DriverRing, RingError> {
        Ok(match layout {
            RingLayout::Split(layout) => DriverRing::Split(SplitDriver::new(memory, layout, features)?),
            RingLayout::Packed(layout) => DriverRing::Packed(PackedDriver::new(memory, layout, features)?),
        })
    }

    /// Opens a ring with the saved `state`.
    ///
    /// # Errors
    /// As [`SplitDriver::restore`] and [`PackedDriver::restore`]; [`RingError::State`] for the state of the other kind
    /// of ring.
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
            _ => return Err(RingError::State { fault: "it belongs to the other kind of ring, split or packed" }),
        })
    }

    /// The state for [`DriverRing::restore`].
    pub fn state(&self) -> DriverRingState {
        match self {
            DriverRing::Split(ring) => DriverRingState::Split(ring.state()),
            DriverRing::Packed(ring) => DriverRingState::Packed(ring.state()),
        }
    }

    /// Adds a request and returns its name, or `None` while the ring has too few free descriptors.
    ///
    /// # Errors
    /// As [`SplitDriver::add`] and [`PackedDriver::add`].
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

    /// Publishes the requests added so far. Returns true if the device must be kicked.
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
    /// [`RingError`] if the device has broken the ring. Nothing is taken then.
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

    /// Asks the device to notify. Returns true if there are completions already.
    #[must_use = "completions that are there already bring no notification"]
    pub fn enable_notifications(&mut self) -> bool {
        match self {
            DriverRing::Split(ring) => ring.enable_notifications(),
            DriverRing::Packed(ring) => ring.enable_notifications(),
        }
    }

    /// Number of requests without a completion.
    pub fn outstanding(&self) -> u16 {
        match self {
            DriverRing::Split(ring) => ring.outstanding(),
            DriverRing::Packed(ring) => ring.outstanding(),
        }
    }

    /// Number of free descriptors.
    pub fn free(&self) -> u16 {
        match self {
            DriverRing::Split(ring) => ring.free(),
            DriverRing::Packed(ring) => ring.free(),
        }
    }
}
