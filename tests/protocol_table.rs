//! `docs/protocol.md` against the tree: its tables of messages and features are complete, each obligation has a test or
//! a reason for having none, and every citation of a rule names one that exists.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use bitflags::Flags;
use rstest::rstest;
use vhost_migrate::abi::vhost_user::{BackendRequest, FrontendRequest, ProtocolFeatures};
use vhost_migrate::check;

const PAGE: &str = include_str!("../docs/protocol.md");
const VIRTIO: &str = include_str!("../src/abi/virtio.rs");
const VHOST: &str = include_str!("../src/abi/vhost.rs");

/// The cells of a row: names, the back-end and its tests, the front-end and its tests, and three peers.
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

/// The names between backticks that begin with one of these folders.
fn cited(text: &'static str, folders: &'static [&'static str]) -> impl Iterator<Item = &'static str> {
    text.split('`').filter(|word| folders.iter().any(|folder| word.starts_with(folder)))
}

#[test]
fn every_request_has_a_row_and_no_row_is_about_anything_else() {
    let known: BTreeSet<_> = (1..=64).filter_map(|number| FrontendRequest(number).name()).map(str::to_owned).collect();
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
    let known: BTreeSet<_> =
        ProtocolFeatures::FLAGS.iter().filter(|f| f.is_named()).map(|f| f.name().to_owned()).collect();
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
    // These two bits are vhost's, not virtio's.
    known.extend(["LOG_ALL", "PROTOCOL_FEATURES"].map(str::to_owned));
    assert_eq!(names("feature bit"), known);
}

#[test]
fn every_ioctl_of_the_kernel_has_a_row_and_those_in_use_have_tests() {
    let part = PAGE.split("| ioctl | this front-end |").nth(1).unwrap();
    let rows: Vec<Vec<_>> =
        part.lines().skip(2).map(|line| line.trim_matches(['|', ' ']).split(" | ").collect()).collect();
    let names: Vec<_> = rows.iter().flat_map(|row| row[0].split(", ")).collect();
    let ioctls =
        VHOST.lines().filter(|line| ["= io(", "= ior::<", "= iow::<", "= iowr::<"].iter().any(|io| line.contains(io)));
    let known: BTreeSet<_> =
        ioctls.map(|line| line.strip_prefix("pub const VHOST_").unwrap().split(':').next().unwrap()).collect();
    assert!(known.len() > 50);
    assert_eq!(names.len(), known.len());
    assert_eq!(names.into_iter().collect::<BTreeSet<_>>(), known);
    for row in rows {
        assert_eq!(row[1].starts_with('—'), cited(row[2], &["tests/", "src/"]).next().is_none(), "{row:?}");
    }
}

/// A role that handles the item, even if only by refusing it, names tests. A role that does not handle it names none.
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

/// Returns true if `text` contains `name` as a word, or after the prefix of a constant.
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

/// A rule of the page: a section with numbered obligations, their tests, and reasons for those without.
struct Rule {
    id: &'static str,
    subject: &'static str,
    text: &'static str,
}

impl Rule {
    /// Numbers and texts of the obligations.
    fn obligations(&self) -> Vec<(&'static str, &'static str)> {
        let bullets = self.text.split("\n- **").skip(1);
        bullets
            .map(|bullet| bullet.split("\n\n").next().unwrap().split_once("** ").expect("a number and a text"))
            .collect()
    }

    /// The obligations that a paragraph with this title names in parentheses.
    fn named(&self, title: &str) -> BTreeSet<String> {
        let paragraphs = self.text.split("\n\n").flat_map(|paragraph| paragraph.split("\nNot tested:"));
        let named = paragraphs.filter(|paragraph| paragraph.starts_with(title)).flat_map(|paragraph| {
            paragraph.split('(').skip(1).flat_map(|part| expand(part.split([')', ':']).next().unwrap()))
        });
        named.collect()
    }

    /// The obligations of the paragraph "Not tested", each followed by a reason in parentheses.
    fn excused(&self) -> BTreeSet<String> {
        let Some((_, reasons)) = self.text.split_once("\nNot tested: ") else { return BTreeSet::new() };
        let excuses = reasons.split("\n\n").next().unwrap().split("), ");
        let excuses = excuses.map(|excuse| excuse.split_once(" (").expect("a number and a reason"));
        excuses
            .inspect(|(id, reason)| assert!(reason.len() > 20, "{id} needs a reason"))
            .flat_map(|(id, _)| expand(id))
            .collect()
    }
}

/// The single obligations of a list such as `R3.1, R3.3 to R3.5`.
fn expand(list: &str) -> Vec<String> {
    let one = |part: &str| {
        let ends: Vec<_> = part.split_whitespace().filter(|word| *word != "to").collect();
        let (first, last) = (ends.first().copied().unwrap_or_default(), ends.last().copied().unwrap_or_default());
        let numbers = number(first).zip(number(last)).into_iter().flat_map(|(first, last)| first..=last);
        let rule = first.split('.').next().unwrap_or_default().to_owned();
        numbers.map(move |number| format!("{rule}.{number}")).collect::<Vec<_>>()
    };
    list.split(", ").flat_map(one).collect()
}

/// The number of an obligation within its rule.
fn number(id: &str) -> Option<u32> {
    id.split_once('.')?.1.parse().ok()
}

fn rules() -> Vec<Rule> {
    let sections = PAGE.split("\n## ").flat_map(|part| part.split("\n### ").skip(1));
    let rules = sections.map(|section| {
        let (title, text) = section.split_once('\n').unwrap();
        let (id, subject) = title.split_once(' ').unwrap();
        Rule { id, subject, text }
    });
    rules.collect()
}

#[test]
fn obligations_are_numbered_without_gaps_and_have_at_most_three_lines() {
    let rules = rules();
    assert!(rules.len() > 50);
    for rule in rules {
        let obligations = rule.obligations();
        assert!(!obligations.is_empty(), "{} has no obligations", rule.id);
        for ((id, text), expected) in obligations.into_iter().zip(1..) {
            assert_eq!(id, format!("{}.{expected}", rule.id));
            let is_short = text.lines().count() <= 3 && text.lines().all(|line| line.chars().count() <= 120);
            assert!(is_short, "{id} has more than three lines of 120 characters");
        }
    }
}

#[test]
fn every_obligation_has_a_test_or_a_reason_why_not() {
    for rule in rules() {
        let obligations: BTreeSet<_> = rule.obligations().iter().map(|(id, _)| (*id).to_owned()).collect();
        let (tested, excused) = (rule.named("Tests:"), rule.excused());
        assert_eq!(&tested | &excused, obligations, "{}", rule.id);
        assert!(tested.is_disjoint(&excused), "{}: tested and not tested", rule.id);
    }
}

/// The test of an obligation can be found by its number.
#[test]
fn every_tested_obligation_is_cited_in_one_of_the_files_named() {
    for rule in rules() {
        let mut missing = rule.named("Tests:");
        for name in cited(rule.text, &["tests/", "src/"]) {
            let text = fs::read_to_string(path(name)).expect(name);
            missing = &missing - &cited_obligations(&text);
        }
        assert_eq!(missing, BTreeSet::new(), "not cited in the files that docs/protocol.md names");
    }
}

#[test]
fn a_rule_has_the_same_subject_here_and_in_the_report_of_a_check() {
    let lower = |text: &str| text.to_lowercase();
    let page: BTreeMap<_, _> = rules().iter().map(|rule| (rule.id, lower(rule.subject))).collect();
    for rule in check::Rule::ALL {
        assert_eq!(page.get(rule.id()), Some(&lower(rule.title())), "{rule}");
    }
}

/// All Rust and Markdown files, and scripts.
fn sources() -> Vec<PathBuf> {
    let mut files = vec![path("README.md"), path("CHANGELOG.md")];
    let mut folders: Vec<_> =
        ["src", "bin", "tests", "docs", "benches", "examples", "fuzz/fuzz_targets"].map(path).to_vec();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            let (path, kind) = (entry.path(), entry.file_type().unwrap());
            let is_text = path.extension().is_none_or(|extension| extension == "rs" || extension == "md");
            match kind {
                _ if kind.is_dir() => folders.push(path),
                _ if is_text => files.push(path),
                _ => {}
            }
        }
    }
    files
}

/// Returns true if `word` has the form of a rule (`R3`) or of an obligation (`R3.2`).
fn is_id(word: &str) -> bool {
    // X is for rules that do not exist, in tests.
    let Some(numbers) = word.strip_prefix(|c: char| c.is_ascii_uppercase() && c != 'X') else { return false };
    let mut numbers = numbers.split('.');
    let is_number = |number: &str| (1..=2).contains(&number.len()) && number.bytes().all(|byte| byte.is_ascii_digit());
    numbers.all(is_number)
}

/// The citations in a text: obligations anywhere, and rules in quotes or after the word "rule" or "rules", alone or in
/// a list.
fn citations(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('"').filter(|quoted| is_id(quoted));
    let words = text.split(|c: char| c != '.' && !c.is_ascii_alphanumeric()).map(|word| word.trim_matches('.'));
    let mut listed = false;
    let named = words.filter(|word| !word.is_empty()).filter(move |word| {
        let is_id = is_id(word);
        listed = matches!(*word, "rule" | "rules" | "Rule" | "Rules")
            || listed && (is_id || matches!(*word, "and" | "to" | "or"));
        is_id && (listed || word.contains('.'))
    });
    named.chain(quoted)
}

/// The obligations that a text cites, including each obligation of a range: `R3.1 to R3.3`.
fn cited_obligations(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| c != '.' && !c.is_ascii_alphanumeric()).map(|word| word.trim_matches('.'));
    let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
    let single = words.iter().filter(|word| is_id(word)).map(|word| (*word).to_owned());
    let range = |three: &[&str]| match three {
        [first, "to", last] if is_id(first) && is_id(last) => expand(&format!("{first} to {last}")),
        _ => Vec::new(),
    };
    single.chain(words.windows(3).flat_map(range)).collect()
}

#[test]
fn a_citation_is_found_in_every_form() {
    let of = |text| citations(text).collect::<Vec<_>>();
    assert_eq!(of("as it must (rule L10)."), ["L10"]);
    assert_eq!(of("(rules B1 and B3.1), T2"), ["B1", "B3.1", "T2"]);
    assert_eq!(of("Rule R3, and\n/// then (P1.4), but F16 is a type"), ["R3", "P1.4"]);
    assert_eq!(of("read(\"F3\"), size: R8"), ["F3"]);
    assert_eq!(of("rule F4.3.2"), ["F4.3.2"]);
}

#[test]
fn every_citation_names_a_rule_or_an_obligation_that_exists() {
    let known: BTreeSet<_> =
        rules().iter().flat_map(|rule| rule.obligations().into_iter().map(|(id, _)| id).chain([rule.id])).collect();
    let mut count = 0;
    for file in sources().iter().filter(|file| !file.ends_with("tests/protocol_table.rs")) {
        // Test data without an extension is not text.
        let Ok(text) = String::from_utf8(fs::read(file).unwrap()) else { continue };
        let cited: BTreeSet<_> = citations(&text).collect();
        count += cited.len();
        let unknown: BTreeSet<_> = cited.into_iter().filter(|id| !known.contains(id)).collect();
        assert!(unknown.is_empty(), "{} cites {unknown:?}, which docs/protocol.md does not have", file.display());
    }
    assert!(count > 300, "only {count} citations");
    // Within the page, rules are cited without that word.
    let words = PAGE.split(|c: char| c != '.' && !c.is_ascii_alphanumeric()).map(|word| word.trim_matches('.'));
    let unknown: BTreeSet<_> = words.filter(|word| is_id(word) && !known.contains(word)).collect();
    assert_eq!(unknown, BTreeSet::new());
}
