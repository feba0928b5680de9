//! The rules of `docs/protocol.md`, and those that cannot be checked from outside.

use super::CheckError;

/// Rules of `docs/protocol.md` that a specification makes, with their titles.
pub const RULES: &[(&str, &str)] = &[
    ("F1", "messages"),
    ("F2", "flags"),
    ("F3", "replies"),
    ("F4", "acknowledgements and order"),
    ("F5", "unknown and refused requests"),
    ("F6", "payload sizes"),
    ("F7", "reply to SET_LOG_BASE"),
    ("F8", "call descriptors and the channel's socket"),
    ("F9", "descriptors shared with the peer"),
    ("F10", "late replies"),
    ("B1", "back-end channel"),
    ("B2", "configuration changes"),
    ("B3", "in-band notifications"),
    ("B4", "host notifiers"),
    ("R1", "features"),
    ("R2", "ring states"),
    ("R3", "drain at GET_VRING_BASE"),
    ("R4", "ring bases"),
    ("R5", "SET_VRING_ADDR on a running ring"),
    ("R6", "start order of QEMU"),
    ("R7", "start order of User-mode Linux"),
    ("R8", "resets"),
    ("R9", "connections"),
    ("R10", "notifications without a call descriptor"),
    ("R11", "queue pairs in use"),
    ("R12", "used lengths"),
    ("T1", "translations and misses"),
    ("T2", "IOTLB messages"),
    ("T3", "invalidation"),
    ("T4", "rings in scattered pages"),
    ("T5", "offer of ACCESS_PLATFORM"),
    ("L1", "pages and marks"),
    ("L2", "size and place of the log"),
    ("L3", "logged writes"),
    ("L4", "log of packed rings"),
    ("L5", "the log behind an IOMMU"),
    ("L6", "pages outside the log"),
    ("L7", "logging on and off"),
    ("L8", "rings that start before the log"),
    ("L9", "changes of log and memory while rings run"),
    ("L10", "order of data, log bit and used index"),
    ("L11", "shared logs"),
    ("L12", "SET_LOG_FD"),
    ("L13", "harvest"),
    ("L14", "pages that could not be sent"),
    ("L15", "the log of a back-end that died"),
    ("I1", "GET_INFLIGHT_FD and SET_INFLIGHT_FD"),
    ("I2", "inflight region of split rings"),
    ("I3", "recovery of split rings"),
    ("I4", "inflight region of packed rings"),
    ("I5", "a fresh inflight region on a used ring"),
    ("I6", "request counters"),
    ("I7", "inflight region after a reset"),
    ("I8", "migration with requests in flight"),
    ("I9", "I/O that outlives its process"),
    ("I10", "lock before recovery"),
    ("I11", "stable storage at GET_VRING_BASE"),
    ("I12", "a base that contradicts region or descriptors"),
    ("M1", "memory table"),
    ("C1", "configuration space"),
    ("D1", "device state"),
    ("D2", "trial before the commit"),
    ("P1", "postcopy"),
];

/// Rules that cannot be checked from outside, with the reason.
pub(super) const UNTESTABLE: &[(&str, &str)] = &[
    ("B2", "no action of a front-end requires a notification"),
    ("B4", "concerns hardware"),
    ("F9", "a back-end that blocks forever would prevent all later checks"),
    ("F10", "concerns front-ends"),
    ("R11", "needs a control queue, which `check` does not drive"),
    ("R12", "other writes of a device cannot be seen from outside"),
    ("I10", "the time of the claim cannot be seen from outside"),
    ("I11", "the contents of stable storage cannot be seen from outside"),
    ("I12", "needs a driver that starts again within its session"),
    ("D2", "the limits of a back-end are not known outside"),
    ("L13", "concerns front-ends; L11 checks that marks survive it"),
    ("L14", "concerns front-ends"),
];

/// Returns the id of a rule as in `docs/protocol.md`, for an id in any case.
///
/// # Errors
/// [`CheckError::NoSuchRule`], which lists all rules.
pub fn rule(id: &str) -> Result<&'static str, CheckError> {
    let known = RULES.iter().find(|(known, _)| known.eq_ignore_ascii_case(id));
    known.map(|(known, _)| *known).ok_or_else(|| CheckError::NoSuchRule(id.into()))
}

/// Returns all ids.
pub(super) fn ids() -> String {
    RULES.iter().map(|(id, _)| *id).collect::<Vec<_>>().join(", ")
}
