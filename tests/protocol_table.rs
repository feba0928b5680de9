//! The tables of `docs/protocol.md` leave out nothing that has a number, and each role that says yes names tests that are there
//! and speak of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use rstest::rstest;
use vhost_migrate::abi::vhost_user::{BackendRequest, Request, protocol_feature};

const PAGE: &str = include_str!("../docs/protocol.md");
const VIRTIO: &str = include_str!("../src/abi/virtio.rs");

/// Of each row: what it is about, the back-end and its tests, the front-end and its tests, and three peers.
const COLUMNS: usize = 8;
const TITLES: [&str; 3] = ["request", "protocol feature", "feature bit"];

type Row = [&'static str; COLUMNS];

fn table(title: &str) -> Vec<Row> {
    let part = PAGE.split(&format!("| {title} | back-end |")).nth(1).unwrap().split("\n\n").next().unwrap();
    let rows = part.lines().skip(2).map(|line| {
        let cells: Vec<_> = line.trim_start_matches("| ").trim_end_matches(" |").split(" | ").collect();
        cells.try_into().unwrap_or_else(|cells| panic!("not {COLUMNS} cells: {cells:?}"))
    });
    rows.collect()
}

fn names(title: &str) -> BTreeSet<String> {
    table(title).iter().flat_map(|row| row[0].split(", ")).map(str::to_owned).collect()
}

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// What is named between backticks and lies in one of these folders.
fn cited(text: &'static str, folders: &'static [&'static str]) -> impl Iterator<Item = &'static str> {
    text.split('`').filter(|word| folders.iter().any(|folder| word.starts_with(folder)))
}

#[test]
fn every_request_has_a_row_and_no_row_is_about_anything_else() {
    let known: BTreeSet<_> = (1..=64).filter_map(|number| Request(number).name()).map(str::to_owned).collect();
    assert!(known.len() > 40);
    assert_eq!(names("request"), known);
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
    assert_eq!(names("protocol feature"), known);
}

#[test]
fn every_feature_bit_of_rings_and_transport_has_a_row() {
    let constants = VIRTIO.lines().filter_map(|line| line.strip_prefix("pub const VIRTIO_")?.split(':').next());
    let mut known: BTreeSet<_> = constants
        .filter_map(|name| name.strip_prefix("F_").or_else(|| name.strip_prefix("RING_F_")))
        .map(str::to_owned)
        .collect();
    assert!(known.len() > 10);
    // vhost's own.
    known.extend(["LOG_ALL", "PROTOCOL_FEATURES"].map(str::to_owned));
    assert_eq!(names("feature bit"), known);
}

/// A role that does something with it, and be it that it refuses, names tests; one that does not, names none.
#[rstest]
fn every_role_that_speaks_it_names_tests_and_each_name_is_in_one_of_them(
    #[values("request", "protocol feature", "feature bit")] title: &str,
    #[values(("back-end", 1), ("front-end", 3))] (role, column): (&str, usize),
) {
    for row in table(title) {
        let texts: Vec<_> =
            cited(row[column + 1], &["tests/"]).map(|name| fs::read_to_string(path(name)).expect(name)).collect();
        let speaks = !row[column].starts_with('—');
        assert_eq!(speaks, !texts.is_empty(), "{role}: {row:?}");
        for name in row[0].split(", ").filter(|_| speaks) {
            assert!(texts.iter().any(|text| speaks_of(text, name)), "{role}: {name} is in none of {}", row[column + 1]);
        }
    }
}

/// Whether it is there as a word, or behind the prefix of a constant.
fn speaks_of(text: &str, name: &str) -> bool {
    let words = text.split(|c: char| c != '_' && !c.is_ascii_alphanumeric());
    words.into_iter().any(|word| {
        let constant = ["VIRTIO_F_", "VIRTIO_RING_F_", "VHOST_F_", "VHOST_USER_F_"];
        word == name || constant.iter().any(|prefix| word.strip_prefix(prefix) == Some(name))
    })
}

#[test]
fn of_every_peer_it_is_said_what_it_has() {
    for row in TITLES.iter().flat_map(|title| table(title)) {
        assert!(row.iter().all(|cell| !cell.trim().is_empty() && !cell.contains('?')), "{row:?}");
    }
}

#[test]
fn the_files_that_are_named_are_there() {
    let named: BTreeSet<_> = cited(PAGE, &["tests/", "src/"]).collect();
    assert!(named.len() > 30);
    for name in named {
        assert!(path(name).exists(), "{name}");
    }
}
