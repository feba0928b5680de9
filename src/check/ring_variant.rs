//! The rings that a check is run on.

/// Selection of rings for a check.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RingSelection {
    /// One run: rings make no difference.
    Once,
    /// Split and packed rings for requests, or the transmit rings.
    Main,
    /// Split and packed rings by which the device writes data: for requests, or the receive rings.
    Data,
    /// As `Data`, or as `Main` without a frame source.
    DataOrMain,
    /// All rings.
    All,
    /// All split rings.
    AllSplit,
    /// All packed rings.
    AllPacked,
}

/// Direction of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// Self-contained requests.
    Requests,
    /// Outgoing frames.
    Transmit,
    /// Incoming frames.
    Receive,
}

/// Ring format and direction that a check is run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingVariant {
    pub(super) packed: bool,
    pub(super) flow: Flow,
}

impl RingVariant {
    pub(super) fn name(self) -> &'static str {
        match (self.flow, self.packed) {
            (Flow::Requests, false) => "split",
            (Flow::Requests, true) => "packed",
            (Flow::Transmit, false) => "split transmit",
            (Flow::Transmit, true) => "packed transmit",
            (Flow::Receive, false) => "split receive",
            (Flow::Receive, true) => "packed receive",
        }
    }
}
