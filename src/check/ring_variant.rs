//! The rings that a check is run on.

/// On which rings a check is run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RingSelection {
    /// Once: rings make no difference.
    Once,
    /// On split and packed rings; of a network interface, those that frames leave by.
    Main,
    /// On split and packed rings by which the device writes data.
    Data,
    /// The same, but without anybody to bring frames in, those that they leave by.
    DataOrMain,
    /// On all of them.
    All,
    /// On all split ones.
    AllSplit,
    /// On all packed ones.
    AllPacked,
}

/// What rings carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    /// Requests to a disk.
    Requests,
    /// Frames that leave.
    Transmit,
    /// Frames that come in.
    Receive,
}

/// Rings to run a check on.
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
