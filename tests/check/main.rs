//! `check`: our own back-ends keep every rule, and whoever breaks one is found out, by the rule.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod bent;
mod clumsy;
mod command;
mod healthy;
mod rules;
mod wire;
