//! The tables of `docs/protocol.md` leave out nothing that has a number, and name tests that are there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::BTreeSet;
use std::path::Path;

use vhost_migrate::abi::vhost_user::{BackendRequest, Request, protocol_feature};

const PAGE: &str = include_str!("../docs/protocol.md");

/// The words in the first column of the rows between two lines.
fn first_column(from: &str, to: &str) -> BTreeSet<String> {
    let part = PAGE.split(from).nth(1).unwrap().split(to).next().unwrap();
    let cells = part.lines().filter_map(|line| line.strip_prefix("| ")?.split(" |").next());
    cells.flat_map(|cell| cell.split(", ")).map(str::to_owned).collect()
}

#[test]
fn every_request_has_a_row_and_no_row_is_about_anything_else() {
    let known: BTreeSet<_> = (1..=64).filter_map(|number| Request(number).name()).map(str::to_owned).collect();
    assert!(known.len() > 40);
    assert_eq!(first_column("| request | back-end |", "On the back-end channel"), known);
}

#[test]
fn every_message_of_a_back_end_is_spoken_of() {
    let part = PAGE.split("On the back-end channel").nth(1).unwrap().split("| protocol feature").next().unwrap();
    let words: BTreeSet<_> = part.split(|c: char| c != '_' && !c.is_ascii_alphanumeric()).collect();
    let names: Vec<_> = (1..=64).filter_map(|number| BackendRequest(number).name()).collect();
    assert!(names.len() >= 10);
    for name in names {
        assert!(words.contains(name.trim_start_matches("BACKEND_")), "{name}");
    }
}

#[test]
fn every_protocol_feature_has_a_row() {
    let known: BTreeSet<_> = protocol_feature::NAMES.iter().map(|(_, name)| (*name).to_owned()).collect();
    assert_eq!(first_column("| protocol feature | back-end |", "Of the virtio feature bits"), known);
}

#[test]
fn the_tests_that_are_named_are_there() {
    let named: BTreeSet<_> =
        PAGE.split('`').filter(|word| word.starts_with("tests/") || word.starts_with("src/")).collect();
    assert!(named.len() > 30);
    for name in named {
        assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(name).exists(), "{name}");
    }
}
