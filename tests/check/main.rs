//! `check`: our own back-ends keep every rule, and whoever breaks one is found out, by the rule.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod bend;
mod bent;
mod channel;
mod clumsy;
mod command;
mod devices;
mod healthy;
mod iommu;
mod late;
mod rules;
mod state;
mod wire;
