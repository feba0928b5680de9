//! The rules of `docs/protocol.md`, and those that cannot be checked from outside.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

macro_rules! rules {
    ($($rule:ident $title:literal,)*) => {
        /// A rule of `docs/protocol.md` that a specification makes. The variant's name is the rule's id.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
        pub enum Rule {
            $(#[doc = concat!("Rule ", stringify!($rule), ": ", $title, ".")] $rule,)*
        }

        impl Rule {
            /// All rules, in the order of `docs/protocol.md`.
            pub const ALL: &[Rule] = &[$(Rule::$rule,)*];

            /// Returns the id, such as `R3`.
            pub fn id(self) -> &'static str {
                match self {
                    $(Rule::$rule => stringify!($rule),)*
                }
            }

            /// Returns the title of the rule's section.
            pub fn title(self) -> &'static str {
                match self {
                    $(Rule::$rule => $title,)*
                }
            }
        }
    };
}

rules! {
    F1 "messages",
    F2 "flags",
    F3 "replies",
    F4 "acknowledgements and order",
    F5 "unknown and refused requests",
    F6 "payload sizes",
    F7 "reply to SET_LOG_BASE",
    F8 "call descriptors and the channel's socket",
    F9 "descriptors shared with the peer",
    F10 "late replies",
    B1 "back-end channel",
    B2 "configuration changes",
    B3 "in-band notifications",
    B4 "host notifiers",
    R1 "features",
    R2 "ring states",
    R3 "drain at GET_VRING_BASE",
    R4 "ring bases",
    R5 "SET_VRING_ADDR on a running ring",
    R6 "start order of QEMU",
    R7 "start order of User-mode Linux",
    R8 "resets",
    R9 "connections",
    R10 "notifications without a call descriptor",
    R11 "queue pairs in use",
    R12 "used lengths",
    T1 "translations and misses",
    T2 "IOTLB messages",
    T3 "invalidation",
    T4 "rings in scattered pages",
    T5 "offer of ACCESS_PLATFORM",
    L1 "pages and marks",
    L2 "size and place of the log",
    L3 "logged writes",
    L4 "log of packed rings",
    L5 "the log behind an IOMMU",
    L6 "pages outside the log",
    L7 "logging on and off",
    L8 "rings that start before the log",
    L9 "changes of log and memory while rings run",
    L10 "order of data, log bit and used index",
    L11 "shared logs",
    L12 "SET_LOG_FD",
    L13 "harvest",
    L14 "pages that could not be sent",
    L15 "the log of a back-end that died",
    I1 "GET_INFLIGHT_FD and SET_INFLIGHT_FD",
    I2 "inflight region of split rings",
    I3 "recovery of split rings",
    I4 "inflight region of packed rings",
    I5 "a fresh inflight region on a used ring",
    I6 "request counters",
    I7 "inflight region after a reset",
    I8 "migration with requests in flight",
    I9 "I/O that outlives its process",
    I10 "lock before recovery",
    I11 "stable storage at GET_VRING_BASE",
    I12 "a base that contradicts region or descriptors",
    M1 "memory table",
    C1 "configuration space",
    D1 "device state",
    D2 "trial before the commit",
    P1 "postcopy",
}

impl Rule {
    /// Returns the reason why the rule cannot be checked from outside, if there is one.
    pub(super) fn untestable(self) -> Option<&'static str> {
        Some(match self {
            Rule::B2 => "no action of a front-end requires a notification",
            Rule::B4 => "concerns hardware",
            Rule::F9 => "a back-end that blocks forever would prevent all later checks",
            Rule::F10 | Rule::L14 => "concerns front-ends",
            Rule::R11 => "needs a control queue, which `check` does not drive",
            Rule::R12 => "other writes of a device cannot be seen from outside",
            Rule::I10 => "the time of the claim cannot be seen from outside",
            Rule::I11 => "the contents of stable storage cannot be seen from outside",
            Rule::I12 => "needs a driver that starts again within its session",
            Rule::D2 => "the limits of a back-end are not known outside",
            Rule::L13 => "concerns front-ends; L11 checks that marks survive it",
            _ => return None,
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.id())
    }
}

/// An id that no rule has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no rule {0:?}; the rules are {known}", known = Rule::ALL.iter().map(|rule| rule.id()).collect::<Vec<_>>().join(", "))]
pub struct NoSuchRule(pub String);

/// Parses an id in any case.
impl FromStr for Rule {
    type Err = NoSuchRule;

    fn from_str(id: &str) -> Result<Rule, NoSuchRule> {
        let known = Rule::ALL.iter().find(|rule| rule.id().eq_ignore_ascii_case(id));
        known.copied().ok_or_else(|| NoSuchRule(id.into()))
    }
}
