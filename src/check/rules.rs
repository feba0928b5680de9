//! Every rule of `docs/protocol.md`, and which of them a back-end's peer can't see it keep.

use super::CheckError;

/// Every rule of `docs/protocol.md`, with its subject.
pub const RULES: &[(&str, &str)] = &[
    ("F1", "framing"),
    ("F2", "flags"),
    ("F3", "replies"),
    ("F4", "acknowledgements and order"),
    ("F5", "unknown requests"),
    ("F6", "payloads larger than their content"),
    ("F7", "reply to SET_LOG_BASE"),
    ("F8", "notification through sockets and pipes"),
    ("F9", "descriptors that may block"),
    ("F10", "replies that come late"),
    ("B1", "the back-end channel"),
    ("B2", "news of configuration"),
    ("B3", "notifications in messages"),
    ("B4", "doorbells of hardware"),
    ("R1", "features that are not offered"),
    ("R2", "started and enabled"),
    ("R3", "drain at GET_VRING_BASE"),
    ("R4", "bases"),
    ("R5", "SET_VRING_ADDR on a running ring"),
    ("R6", "order in which QEMU starts"),
    ("R7", "order in which User-mode Linux starts"),
    ("R8", "resets"),
    ("R9", "reconnecting"),
    ("R10", "notifications before there is a call fd"),
    ("R11", "pairs in use before the driver says how many"),
    ("R12", "used lengths"),
    ("T1", "translations and misses"),
    ("T2", "IOTLB messages"),
    ("T3", "invalidation"),
    ("T4", "rings in scattered pages"),
    ("T5", "offer of ACCESS_PLATFORM"),
    ("L1", "marks of data"),
    ("L2", "logs of any size and place"),
    ("L3", "marks of the used ring"),
    ("L4", "marks of packed rings"),
    ("L5", "marks behind an IOMMU"),
    ("L6", "pages outside the log"),
    ("L7", "logging on and off"),
    ("L8", "reconnecting while logging"),
    ("L9", "changes under load"),
    ("L10", "order of data, mark and used index"),
    ("L11", "several writers of one log"),
    ("L12", "SET_LOG_FD"),
    ("L13", "harvest"),
    ("L14", "pages that could not be sent"),
    ("L15", "the log of a dead back-end"),
    ("I1", "shape of the inflight region"),
    ("I2", "contents of the inflight region"),
    ("I3", "recovery"),
    ("I4", "packed inflight regions"),
    ("I5", "a fresh region on a used ring"),
    ("I6", "counters"),
    ("I7", "region after a reset"),
    ("I8", "unstable features"),
    ("I9", "I/O that outlives its process"),
    ("I10", "claim before recovery"),
    ("I11", "stable storage at GET_VRING_BASE"),
    ("I12", "a base beside a region or descriptors that say otherwise"),
    ("M1", "memory table"),
    ("C1", "configuration space"),
    ("D1", "device state"),
    ("D2", "refusals before a migration's commit"),
    ("P1", "postcopy"),
];

/// Rules that a back-end's peer can't see it keep, and why.
pub(super) const ASIDE: &[(&str, &str)] = &[
    ("B2", "nothing that a front-end does obliges a back-end to tell of a change"),
    ("B4", "is about hardware"),
    ("F9", "a back-end that blocks for good would hold up every later check"),
    ("F10", "is the front-end's"),
    ("R11", "needs a control queue, which this check does not drive"),
    ("R12", "what a device has written beside its answer is its own business"),
    ("I10", "when a claim is made can't be seen from outside"),
    ("I11", "what is on stable storage can't be seen from outside"),
    ("I12", "needs a driver that starts afresh within its session"),
    ("D2", "what a back-end could not serve now is its own business"),
    ("L13", "is the front-end's; that marks survive it is checked with L11"),
    ("L14", "is the front-end's"),
];

/// The id of a rule, written in any case, as it stands in `docs/protocol.md`.
///
/// # Errors
/// [`CheckError::NoSuchRule`], which lists the rules that there are.
pub fn rule(id: &str) -> Result<&'static str, CheckError> {
    let known = RULES.iter().find(|(known, _)| known.eq_ignore_ascii_case(id));
    known.map(|(known, _)| *known).ok_or_else(|| CheckError::NoSuchRule(id.into()))
}

/// All ids.
pub(super) fn ids() -> String {
    RULES.iter().map(|(id, _)| *id).collect::<Vec<_>>().join(", ")
}
