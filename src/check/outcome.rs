//! Verdict and outcome of a check, or the reason why it was aborted.

use std::fmt;
use std::io;
use std::time::Duration;

use serde::Serialize;

use crate::abi::vhost_user::FrontendRequest as Code;
use crate::dirty::DirtyError;
use crate::memory::MemoryError;
use crate::ring::RingError;
use crate::sys::with_causes::with_causes;

/// Result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The check was not run, or had no result.
    NotTested,
    /// The back-end does not offer the feature.
    NotOffered,
    /// No violation was seen.
    Pass,
    /// No violation with loss of data, but a deviation or an avoidable cost.
    Warning,
    /// The rule was violated.
    Fail,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Verdict::NotTested => "not tested",
            Verdict::NotOffered => "not offered",
            Verdict::Pass => "pass",
            Verdict::Warning => "warning",
            Verdict::Fail => "fail",
        })
    }
}

/// Reason why a check was aborted.
#[derive(Debug, thiserror::Error)]
pub(super) enum CheckAbort {
    #[error("{0} is not offered")]
    NotOffered(String),
    #[error("the device kind cannot be detected ({0})")]
    UnknownDevice(String),
    /// The system does not permit it to the back-end.
    #[error("{0}")]
    NotPossible(&'static str),
    #[error("no connection")]
    Connect(#[source] io::Error),
    #[error("the back-end closed the connection at {code}")]
    HungUp { code: Code },
    #[error("no reply to {code} within {waited:?}")]
    Timeout { code: Code, waited: Duration },
    #[error("{code} was refused with {answer:#x}")]
    Refused { code: Code, answer: u64 },
    #[error("{0}")]
    Violation(String),
    #[error("the used ring is invalid")]
    Ring(#[from] RingError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Log(#[from] DirtyError),
    #[error(transparent)]
    System(#[from] io::Error),
}

impl From<nix::Error> for CheckAbort {
    fn from(errno: nix::Error) -> CheckAbort {
        CheckAbort::System(errno.into())
    }
}

/// Verdict of a check, and its observation.
pub(super) struct Outcome(pub(super) Verdict, pub(super) String);

impl Outcome {
    pub(super) fn pass(seen: impl Into<String>) -> Outcome {
        Outcome(Verdict::Pass, seen.into())
    }

    pub(super) fn warning(seen: impl Into<String>) -> Outcome {
        Outcome(Verdict::Warning, seen.into())
    }

    pub(super) fn fail(seen: impl Into<String>) -> Outcome {
        Outcome(Verdict::Fail, seen.into())
    }

    pub(super) fn not_tested(seen: impl Into<String>) -> Outcome {
        Outcome(Verdict::NotTested, seen.into())
    }
}

impl From<CheckAbort> for Outcome {
    fn from(abort: CheckAbort) -> Outcome {
        let verdict = match &abort {
            CheckAbort::NotOffered(_) => Verdict::NotOffered,
            // Errors of this process or of the system say nothing about the back-end.
            CheckAbort::NotPossible(_) | CheckAbort::Memory(_) | CheckAbort::Log(_) | CheckAbort::System(_) => {
                Verdict::NotTested
            }
            _ => Verdict::Fail,
        };
        Outcome(verdict, with_causes(&abort).to_string())
    }
}
