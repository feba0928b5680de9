//! Migrations of a guest that writes continuously, over every transport and through every failure: its data is right
//! wherever it runs, and it runs in exactly one place.
//!
//! | file | promise |
//! |---|---|
//! | `transports` | every byte arrives, over each transport; the figures add up |
//! | `faults` | the connection breaks, hangs or lies at any step: the source goes on |
//! | `refused` | one side says no, is of another version or no migration at all |
//! | `commit` | after the commit, and called off at any moment: the guest runs once |
//! | `disk` | files and commands that can't take it |
//! | `verify` | memory compared before it is handed over; writers that are not tracked |
//! | `other_peers` | what connects and is no migration keeps no source out |
//! | `rounds` | when it ends by itself and when not; the bandwidth limit |

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
