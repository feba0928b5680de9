//! Every rule that has a check has a back-end that breaks it, which the check finds, and nothing else.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use rstest::rstest;
use vhost_migrate::abi::vhost_user::Request as Code;
use vhost_migrate::check::{CheckOptions, CheckReport, FrameSource, RULES, Verdict};
use vhost_migrate::inflight::RingKind;

use crate::backend_channel::Channel;
use crate::fault::Bend;
use crate::faulty_backend::{Backend, checked};
use crate::iommu::Iommu;
use crate::postcopy::Late;
use crate::state::State;

/// A bend, the rules that are checked, as ids or as what ids begin with, and those of them that it breaks.
type Row = (Bend, &'static str, &'static [&'static str]);

const FRAMING: &[Row] = &[
    (Bend::WholeMessages, "F", &["F1"]),
    (Bend::ReplyFlags, "F", &["F2"]),
    (Bend::SecondReply, "F", &["F3"]),
    (Bend::Overtaken, "F", &["F4"]),
    (Bend::NoRefusal, "F", &["F5"]),
    (Bend::KeepsFds, "F", &["F5"]),
    (Bend::ExactTable, "F", &["F6"]),
    (Bend::LongLogReply, "F L2", &["F7"]),
    (Bend::NoSockets, "F", &["F8"]),
    (Bend::ConfigOffset, "F C", &["C1"]),
];

/// All of them but R3, whose check is long.
const ORDER: &str = "R1 R2 R4 R5 R6 R7 R8 R9 R10 I7 F8 L3";

const RINGS: &[Row] = &[
    (Bend::NeedsEnable, ORDER, &["R1"]),
    // Written before the log is there, pages are lost too.
    (Bend::Enabled, "R1 R2 R4 R5 R6 R7 L8", &["R2", "L8"]),
    (Bend::EarlyBase, "R3", &["R3"]),
    (Bend::BaseForgotten, "R4", &["R4"]),
    (Bend::AddrGoesBack, "R1 R2 R4 R5 R6 R7", &["R5"]),
    (Bend::MemoryFirst, "R6 R7 I1 I2 I3 I4", &["R6"]),
    (Bend::LogAddressChecked, ORDER, &["R7"]),
    (Bend::StatusNoted, ORDER, &["R8"]),
    (Bend::ResetIgnored, ORDER, &["R8", "I7"]),
    (Bend::OwnerHangsUp, ORDER, &["R8"]),
    (Bend::CallForgotten, ORDER, &["R10"]),
];

const LOG: &[Row] = &[
    (Bend::NoData, "L M", &["L1", "L2", "L8", "L9", "L11", "L15", "M1"]),
    (Bend::LogOffset, "L", &["L2"]),
    (Bend::LogAddress, "L", &["L3", "L4"]),
    (Bend::LogSize, "L", &["L6"]),
    (Bend::NeverOff, "L", &["L7"]),
    (Bend::LogFirst, "L R6", &["L8", "L15", "R6"]),
    (Bend::OldLog, "L", &["L9"]),
    (Bend::MemoryForgetsLog, "L M", &["L9", "M1"]),
    (Bend::LateMarks, "L", &["L10"]),
    (Bend::StaleMarks, "L", &["L11"]),
    (Bend::NoSignal, "L", &["L12"]),
    (Bend::SuccessorForgets, "L R6", &["L15"]),
    (Bend::FewSlots, "M L9", &["M1"]),
];

const INFLIGHT: &[Row] = &[
    (Bend::HalfRegion, "I1", &["I1"]),
    // Where packed rings go on, only the region knows.
    (Bend::NoInflight, "I L15", &["I2", "I4", "I6", "L15"]),
    (Bend::ForgetsOpen, "I3", &["I3"]),
    (Bend::FreshAtZero, "I", &["I5"]),
    (Bend::NoCounters, "I", &["I6"]),
    (Bend::RegionKept, "I R8", &["I7"]),
];

const CHANNEL: &[Row] = &[
    (Bend::Channel(Channel::EndsConnection), "B", &["B1"]),
    (Bend::Channel(Channel::FirstOnly), "B", &["B1"]),
    (Bend::Channel(Channel::Blocks), "B", &["B1"]),
    // A channel is seen to be another one by what it brings.
    (Bend::Channel(Channel::NoCalls), "B", &["B1", "B3"]),
    (Bend::Channel(Channel::NoKicks), "B", &["B1", "B3"]),
    (Bend::Channel(Channel::KicksStartNothing), "B", &["B3"]),
];

const STATE: &[Row] = &[
    (Bend::State(State::NeverRan), "D", &["D1"]),
    (Bend::State(State::Credulous), "D", &["D1"]),
    (Bend::State(State::Forgets), "D", &["D1"]),
    (Bend::State(State::Resets), "D", &["D1"]),
    (Bend::State(State::HangsUp), "D", &["D1"]),
    (Bend::State(State::Spoilt), "D", &["D1"]),
    (Bend::State(State::AnyDirection), "D", &["D1"]),
];

const IOMMU: &[Row] = &[
    (Bend::Iommu(Iommu::Untranslated), "T1 T4", &["T1", "T4"]),
    (Bend::Iommu(Iommu::Offended), "T L5", &["T1"]),
    (Bend::Iommu(Iommu::BaseWaits), "T1 T2 T3 L5", &["T1"]),
    (Bend::Iommu(Iommu::Strict), "T L5", &["T2"]),
    (Bend::Iommu(Iommu::Stale), "T L5", &["T3"]),
    (Bend::Iommu(Iommu::Hasty), "T3", &["T3"]),
    (Bend::Iommu(Iommu::Contiguous), "T L5", &["T4"]),
    (Bend::Iommu(Iommu::MarksIova), "T1 T3 L5", &["L5"]),
];

const POSTCOPY: &[Row] = &[
    (Bend::Postcopy(Late::Nothing), "P F3 M1", &[]),
    (Bend::Postcopy(Late::OtherFd), "P", &["P1"]),
    (Bend::Postcopy(Late::FrontendAddresses), "P F3", &["P1"]),
    (Bend::Postcopy(Late::SecondAnswer), "P F3", &["F3"]),
    (Bend::Postcopy(Late::AnswersAcknowledgement), "P F3", &["F3"]),
    (Bend::Postcopy(Late::TouchesFirst), "P F3", &["P1"]),
    (Bend::Postcopy(Late::Rests), "P F3", &["P1"]),
    (Bend::Postcopy(Late::EndRefused), "P", &["P1"]),
    (Bend::Postcopy(Late::DiesOfHangUp), "P F3", &["P1", "R9"]),
];

/// Bends that are about split rings, in the way they are made, or take all the time there is.
const SPLIT: &[Bend] = &[
    Bend::NeedsEnable,
    Bend::BaseForgotten,
    Bend::AddrGoesBack,
    Bend::ForgetsOpen,
    Bend::FreshAtZero,
    Bend::NoCounters,
    Bend::Channel(Channel::NoCalls),
    Bend::Channel(Channel::NoKicks),
    Bend::Iommu(Iommu::BaseWaits),
    Bend::Iommu(Iommu::Hasty),
];

/// Bends that show by what happens where nothing may: only they are watched for as long as usual.
const WATCHED: &[Bend] = &[Bend::Enabled, Bend::StatusNoted, Bend::ResetIgnored];

/// Rules whose breaches other tests show: a process that dies, and I/O that outlives it.
const ELSEWHERE: &[&str] = &["R9", "I9"];

/// The rules whose ids begin so.
fn named(starts: &str) -> Vec<&'static str> {
    let is = |id: &str| starts.split(' ').any(|start| id == start || start.len() == 1 && id.starts_with(start));
    RULES.iter().map(|(id, _)| *id).filter(|id| is(id)).collect()
}

fn broken(report: &CheckReport) -> BTreeSet<&'static str> {
    let rules = report.rules().into_iter();
    rules.filter(|(_, verdict)| *verdict == Verdict::Fail).map(|(rule, _)| rule).collect()
}

#[rstest]
#[case::framing(FRAMING, false)]
#[case::rings(RINGS, false)]
#[case::log(LOG, false)]
#[case::inflight(INFLIGHT, false)]
#[case::channel(CHANNEL, true)]
#[case::state(STATE, true)]
#[case::iommu(IOMMU, true)]
#[case::postcopy(POSTCOPY, false)]
fn a_back_end_that_breaks_a_rule_is_found_by_that_and_by_no_other(#[case] rows: &[Row], #[case] every_check: bool) {
    let mut passed = BTreeSet::new();
    let mut failed = BTreeSet::new();
    for (bend, only, breaks) in rows {
        let is_split = SPLIT.contains(bend) || matches!(bend, Bend::Postcopy(_));
        let rings = is_split.then_some(RingKind::Split);
        let usual = CheckOptions::default();
        let settle = if WATCHED.contains(bend) { usual.settle } else { Duration::from_millis(50) };
        let report = checked(*bend, CheckOptions { only: named(only), rings, settle, may_kill: true, ..usual });
        assert_eq!(broken(&report), breaks.iter().copied().collect(), "{bend:?}\n{report}");
        for finding in report.findings.iter().filter(|finding| breaks.contains(&finding.rule)) {
            let checks = if finding.verdict == Verdict::Fail { &mut failed } else { &mut passed };
            checks.insert(finding.what);
        }
    }
    passed.retain(|what| !what.starts_with("hostile") && !failed.contains(what));
    assert!(!every_check || passed.is_empty(), "nobody fails {passed:?}");
}

#[test]
fn a_back_end_that_breaks_nothing_is_not_blamed_and_every_check_is_one_that_somebody_fails() {
    let report = checked(Bend::Nothing, CheckOptions::default());
    assert_eq!(broken(&report), BTreeSet::new(), "{report}");
    let unchecked = |rule: &str| {
        let mut of = report.findings.iter().filter(|finding| finding.rule == rule);
        of.all(|finding| finding.what == RULES.iter().find(|(id, _)| *id == rule).unwrap().1)
    };
    let checked: BTreeSet<&str> = RULES.iter().map(|(id, _)| *id).filter(|id| !unchecked(id)).collect();
    let rows = [FRAMING, RINGS, LOG, INFLIGHT, CHANNEL, STATE, IOMMU, POSTCOPY].into_iter().flatten();
    let failed: BTreeSet<&str> = rows.flat_map(|(.., breaks)| *breaks).chain(ELSEWHERE).copied().collect();
    // Whether in-flight requests may migrate is no duty, nor is an IOMMU.
    assert_eq!(checked.difference(&failed).copied().collect::<Vec<_>>(), ["I8", "T5"], "{report}");
}

#[test]
fn what_costs_and_breaks_nothing_is_a_warning() {
    let report = checked(Bend::Everything, CheckOptions { only: named("L"), ..CheckOptions::default() });
    assert!(!report.has_failures(), "{report}");
    let data = report.findings.iter().find(|finding| finding.rule == "L1").unwrap();
    assert!(data.verdict == Verdict::Warning && data.seen.contains("% of the marks"), "{report}");
    let report = checked(Bend::SuccessorMarksItsOwn, CheckOptions { only: named("L15 L8"), ..CheckOptions::default() });
    assert_eq!(report.rules().get("L15"), Some(&Verdict::Warning), "{report}");
    assert!(!report.has_failures(), "{report}");
    let report = checked(Bend::Iommu(Iommu::Lenient), CheckOptions { only: named("T"), ..CheckOptions::default() });
    assert!(!report.has_failures(), "{report}");
    assert_eq!(report.rules().get("T2"), Some(&Verdict::Warning), "{report}");
    let report = checked(Bend::EmptyLog, CheckOptions { only: named("L2"), hostile: true, ..CheckOptions::default() });
    let log = report.findings.iter().find(|finding| finding.what.starts_with("hostile")).unwrap();
    assert_eq!(log.verdict, Verdict::Warning, "{report}");
    assert!(log.seen.ends_with("acknowledged as done: a log of no bytes"), "{report}");
    let report = checked(Bend::State(State::Stalls), CheckOptions { only: named("D"), ..CheckOptions::default() });
    assert_eq!(report.rules().get("D1"), Some(&Verdict::Warning), "{report}");
}

#[test]
fn postcopy_that_is_odd_and_loses_nothing_is_a_warning_and_one_that_is_not_possible_is_not_tested() {
    let odd = [
        (Late::WithSlots, "M1", "PAGEFAULT and CONFIGURE_MEM_SLOTS"),
        (Late::AdvisesAnybody, "P1", "answered with an fd"),
        (Late::ListensAnyway, "P1", "acknowledged as done"),
        (Late::MadeUp, "P1", "the next was served; "),
    ];
    for (late, rule, seen) in odd {
        let options = CheckOptions {
            only: named("P F3 M1"),
            rings: Some(RingKind::Split),
            may_kill: true,
            ..CheckOptions::default()
        };
        let report = checked(Bend::Postcopy(late), options);
        assert!(!report.has_failures(), "{late:?}\n{report}");
        let mut warned = report.findings.iter().filter(|finding| finding.verdict == Verdict::Warning);
        let found = warned.next().unwrap();
        assert!(found.rule == rule && found.seen.starts_with(seen) && warned.next().is_none(), "{late:?}\n{report}");
    }
    let options = CheckOptions { only: named("P"), may_kill: true, ..CheckOptions::default() };
    let report = checked(Bend::Postcopy(Late::NoFd), options);
    assert_eq!(report.rules().get("P1"), Some(&Verdict::NotTested), "{report}");
    assert!(report.findings.iter().all(|finding| finding.seen.contains("unprivileged_userfaultfd")), "{report}");
    // Who does not offer it refuses it.
    let report = checked(Bend::Nothing, CheckOptions { only: named("P"), ..CheckOptions::default() });
    assert_eq!(report.rules().get("P1"), Some(&Verdict::NotOffered), "{report}");
    assert!(report.findings.iter().any(|finding| finding.seen.contains("POSTCOPY_ADVISE is refused")), "{report}");
}

#[test]
fn a_back_end_that_says_the_same_without_end_and_reads_nothing_does_not_hold_up_the_check() {
    for (rule, only) in [("B1", vec!["B1"]), ("T2", vec!["T2"])] {
        let options = CheckOptions { only, rings: Some(RingKind::Split), ..CheckOptions::default() };
        let report = checked(Bend::Channel(Channel::Floods), options);
        assert_eq!(broken(&report), BTreeSet::from([rule]), "{report}");
        let why = |seen: &str| seen.contains("does not read them") || seen.contains("no end of them");
        assert!(report.findings.iter().any(|finding| why(&finding.seen)), "{report}");
    }
}

#[test]
fn a_disk_of_large_blocks_is_asked_for_whole_blocks() {
    let (only, rings) = (named("C L1 R3 R9"), Some(RingKind::Split));
    let report = checked(Bend::LargeBlocks, CheckOptions { only, rings, write: true, ..CheckOptions::default() });
    assert_eq!(broken(&report), BTreeSet::new(), "{report}");
    let written = report.findings.iter().find(|finding| finding.what.starts_with("writes that were taken")).unwrap();
    assert_eq!(written.verdict, Verdict::Pass, "{report}");
}

/// A back-end that does not survive a log that is too small: one with bits for the lower region only.
#[test]
fn what_a_back_end_may_die_of_is_done_only_if_it_may() {
    let fragile = Bend::DiesOf(Code::SET_LOG_BASE, &[128, 0, 0, 0, 0, 0, 0, 0]);
    let usual = CheckOptions { only: vec!["L6", "P1"], rings: Some(RingKind::Split), ..CheckOptions::default() };
    let report = checked(fragile, usual.clone());
    assert_eq!(broken(&report), BTreeSet::new(), "{report}");
    let left_out = report.findings.iter().filter(|finding| finding.seen.starts_with("needs --may-kill"));
    assert_eq!(left_out.map(|finding| finding.rule).collect::<Vec<_>>(), ["L6", "P1"], "{report}");
    let report = checked(fragile, CheckOptions { may_kill: true, ..usual });
    assert_eq!(broken(&report), BTreeSet::from(["L6", "R9"]), "{report}");
}

#[test]
fn a_back_end_that_dies_is_a_finding_and_what_comes_after_is_not_held_against_it() {
    let report = checked(Bend::Dies, CheckOptions::default());
    assert_eq!(broken(&report), BTreeSet::from(["F5", "R9"]), "{report}");
    assert_eq!(report.rules().get("R3"), Some(&Verdict::NotTested), "{report}");
}

/// What a back-end dies of, the rule whose check sends it, and how the finding begins.
const DEADLY: &[(Bend, &str, &str)] = &[
    (Bend::DiesOfVersion, "F1", "version 0: "),
    (Bend::DiesOfShort, "F6", "SET_FEATURES: "),
    (Bend::DiesOf(Code::SET_MEM_TABLE, &[0xff; 4]), "M1", "2^32 - 1 regions: "),
    (Bend::DiesOf(Code::SET_VRING_NUM, &[0x0f, 0x27, 0, 0]), "R2", "the size of ring 9999: "),
    (Bend::DiesOf(Code::SET_LOG_BASE, &[0, 0xf0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), "L2", "a log that wraps: "),
    (Bend::DiesOf(Code::GET_CONFIG, &[0xff; 4]), "C1", "configuration that wraps: "),
    (
        Bend::DiesOf(Code::SET_INFLIGHT_FD, &[0, 0xf0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
        "I1",
        "a region that wraps: ",
    ),
    (Bend::DiesOfNoise, "I3", "a region of noise: "),
    (Bend::DiesOfLoop, "R9", "a loop of one: "),
    (Bend::State(State::DiesOfOnes), "D1", "a MiB of ones: "),
];

#[test]
fn what_a_back_end_dies_of_is_sent_only_to_who_asked_for_it() {
    for (bend, rule, message) in DEADLY {
        let usual = CheckOptions { only: vec![*rule], rings: Some(RingKind::Split), ..CheckOptions::default() };
        let usual = CheckOptions { settle: Duration::from_millis(50), ..usual };
        let report = checked(*bend, usual.clone());
        assert_eq!(broken(&report), BTreeSet::new(), "{bend:?}\n{report}");
        let hostile = |report: &CheckReport| {
            let mut hostile = report.findings.iter().filter(|finding| finding.what.starts_with("hostile"));
            hostile.next().unwrap().clone()
        };
        assert_eq!(hostile(&report).seen, "needs --hostile", "{bend:?}\n{report}");
        let report = checked(*bend, CheckOptions { hostile: true, ..usual });
        assert_eq!(broken(&report), BTreeSet::from([*rule, "R9"]), "{bend:?}\n{report}");
        let death = hostile(&report);
        let named = death.verdict == Verdict::Fail && death.seen.starts_with(message);
        assert!(named, "the message that it died of is named, {message:?}: {report}");
    }
}

#[test]
fn a_network_interface_that_logs_nothing_or_goes_on_receiving_is_found_by_what_it_received() {
    let found = |bend: Bend, only: &[&'static str]| {
        let (only, rings) = (only.to_vec(), Some(RingKind::Split));
        let report = Backend::net(bend).checked(CheckOptions {
            only,
            rings,
            frame_source: Some(FrameSource::Loop),
            ..CheckOptions::default()
        });
        let broken = report.findings.iter().filter(|finding| finding.verdict == Verdict::Fail);
        (broken.map(|finding| (finding.rule, finding.rings)).collect::<BTreeSet<_>>(), report)
    };
    let rules = ["L1", "L3", "R3"];
    let (broken, report) = found(Bend::Nothing, &rules);
    assert_eq!(broken, BTreeSet::new(), "{report}");
    let (broken, report) = found(Bend::NoData, &rules);
    assert_eq!(broken, BTreeSet::from([("L1", "split receive")]), "{report}");
    for bend in [Bend::EarlyBase, Bend::GoesOn] {
        let (broken, report) = found(bend, &["R3"]);
        assert!(broken.contains(&("R3", "split receive")), "{bend:?}\n{report}");
    }
}

#[test]
fn only_the_rules_that_were_asked_for_are_in_the_report() {
    let report = checked(Bend::Nothing, CheckOptions { only: vec!["I4", "L13", "F2"], ..CheckOptions::default() });
    let verdicts: Vec<_> = report.rules().into_iter().collect();
    assert_eq!(verdicts, [("F2", Verdict::Pass), ("I4", Verdict::Pass), ("L13", Verdict::NotTested)], "{report}");
    // What I2 and I3 are about on split rings is I4 on packed ones.
    assert!(report.findings.iter().filter(|finding| finding.rule == "I4").all(|finding| finding.rings == "packed"));
}

#[test]
fn every_rule_of_the_specifications_has_a_verdict() {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/protocol.md")).unwrap();
    let (page, _) = page.split_once("\n## Disk generation and identity").expect("the extension of this project");
    let documented: BTreeSet<&str> =
        page.lines().filter_map(|line| line.strip_prefix("### ")?.split(' ').next()).collect();
    let known: BTreeSet<&str> = RULES.iter().map(|(rule, _)| *rule).collect();
    assert_eq!(known, documented);
}
