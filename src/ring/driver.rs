//! The driver side of a ring of either kind. The work is done in `split` and `packed`.

use crate::abi::virtio::{DESC_F_NEXT, DESC_F_WRITE, VIRTIO_F_IN_ORDER, VirtioFeatures};
use crate::memory::{GuestAddress, Memory};

use super::chain::MAX_BUFFERS;
use super::{
    Buffer, InOrderState, PackedDriver, PackedDriverState, RingError, RingLayout, SplitDriver, SplitDriverState,
};

/// A completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct UsedBuffer {
    /// Name of the request as returned by `add`: the head descriptor, or the buffer id.
    pub head: u16,
    /// Number of bytes that the device says it wrote. It is not checked against the buffers.
    pub len: u32,
}

/// Returns the number of descriptors that a request takes in a ring of `size`. With `table`, it is indirect.
///
/// # Errors
/// [`RingError::Request`] for a request that has no buffer or never fits.
pub(super) fn needed_descriptors(
    readable: &[Buffer],
    writable: &[Buffer],
    table: Option<GuestAddress>,
    size: u16,
) -> Result<u16, RingError> {
    let buffers = readable.len() + writable.len();
    let limit = if table.is_some() { MAX_BUFFERS } else { MAX_BUFFERS.min(size.into()) };
    match buffers {
        0 => Err(RingError::Request { buffers, limit }),
        _ if buffers > limit => Err(RingError::Request { buffers, limit }),
        _ if table.is_some() => Ok(1),
        _ => Ok(buffers as u16),
    }
}

/// Returns the buffers of a request with the flags of their descriptors: WRITE, and NEXT for all but the last.
pub(super) fn with_flags<'a>(
    readable: &'a [Buffer],
    writable: &'a [Buffer],
) -> impl Iterator<Item = (&'a Buffer, u16)> {
    let last = (readable.len() + writable.len()).saturating_sub(1);
    let flagged = readable.iter().map(|buffer| (buffer, 0)).chain(writable.iter().map(|b| (b, DESC_F_WRITE)));
    flagged.enumerate().map(move |(at, (buffer, flags))| (buffer, if at < last { flags | DESC_F_NEXT } else { flags }))
}

/// Returns the order of the requests of a new ring, with IN_ORDER negotiated.
pub(super) fn new_order(features: VirtioFeatures) -> Option<InOrderState> {
    (features.contains(VIRTIO_F_IN_ORDER)).then(InOrderState::default)
}

/// Checks the order in a saved state, whose requests have these names.
///
/// # Errors
/// [`RingError::State`].
pub(super) fn check_order(
    order: Option<&InOrderState>,
    features: VirtioFeatures,
    names: impl Iterator<Item = u16>,
) -> Result<(), RingError> {
    if order.is_some() != (features.contains(VIRTIO_F_IN_ORDER)) {
        return Err(RingError::State { fault: "requests have an order only with IN_ORDER" });
    }
    match order.is_some_and(|order| !order.is_of(names)) {
        true => Err(RingError::State { fault: "the order has other requests than the ring" }),
        false => Ok(()),
    }
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
    pub fn new(memory: &Memory, layout: RingLayout, features: VirtioFeatures) -> Result<DriverRing, RingError> {
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
        features: VirtioFeatures,
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
        table: Option<GuestAddress>,
    ) -> Result<Option<u16>, RingError> {
        either!(self, ring => ring.add(readable, writable, table))
    }

    /// Publishes the requests added so far. Returns true if the device must be kicked.
    #[must_use = "the device may be waiting for a kick"]
    pub fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    /// Takes the next completion, if there is one.
    ///
    /// # Errors
    /// [`RingError`] if the device has broken the ring. Nothing is taken then.
    pub fn pop_used(&mut self) -> Result<Option<UsedBuffer>, RingError> {
        either!(self, ring => ring.pop_used())
    }

    /// Asks the device not to notify.
    pub fn disable_notifications(&mut self) {
        either!(self, ring => ring.disable_notifications())
    }

    /// Asks the device to notify. Returns true if there are completions already.
    #[must_use = "completions that are there already bring no notification"]
    pub fn enable_notifications(&mut self) -> bool {
        either!(self, ring => ring.enable_notifications())
    }

    /// Number of requests without a completion.
    pub fn outstanding(&self) -> u16 {
        either!(self, ring => ring.outstanding())
    }

    /// Number of free descriptors.
    pub fn free(&self) -> u16 {
        either!(self, ring => ring.free())
    }
}
