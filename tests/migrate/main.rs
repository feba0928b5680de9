//! Migrations of a guest that writes continuously, over every transport and through every failure: its data is right
//! wherever it runs, and it runs in exactly one place.
//!
//! | file | promise |
//! |---|---|
//! | `transports` | every byte arrives, over each transport; the figures add up |
//! | `faults` | the connection breaks, hangs or is damaged at any step: the guest continues at its source |
//! | `refused` | one side refuses, has another version, or is no migration at all |
//! | `commit` | failures after the commit, cancellation at any time: the guest runs in exactly one place |
//! | `disk` | files and commands that fail |
//! | `verify` | memory compared before the commit; writers that are not tracked |
//! | `other_peers` | peers that connect and are no migration do not block a source |
//! | `rounds` | convergence; the bandwidth limit |

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod commit;
mod disk;
mod faults;
mod guest;
mod harness;
mod other_peers;
mod refused;
#[path = "../kit/relay.rs"]
mod relay;
mod rounds;
mod transports;
mod verify;
