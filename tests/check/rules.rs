//! Each checked rule has a back-end with a fault, which fails its own checks and no others.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use rstest::rstest;
use vhost_migrate::abi::vhost_user::FrontendRequest as Code;
use vhost_migrate::check::Rule::{self, *};
use vhost_migrate::check::{CheckOptions, CheckReport, FrameSource, Verdict};
use vhost_migrate::inflight::RingKind;

use crate::backend_channel::ChannelFault;
use crate::fault::Fault;
use crate::faulty_backend::{Backend, checked};
use crate::iommu::IommuFault;
use crate::postcopy::PostcopyFault;
use crate::state::StateFault;

/// A fault, the rules to check (ids or their first letters), and the rules that it must fail.
type Row = (Fault, &'static str, &'static [Rule]);

const FRAMING: &[Row] = &[
    (Fault::NeedsWholeMessages, "F", &[F1]),
    (Fault::CopiesNeedReplyFlag, "F", &[F2]),
    (Fault::SendsSecondReply, "F", &[F3]),
    (Fault::RepliesOutOfOrder, "F", &[F4]),
    (Fault::IgnoresUnknownRequests, "F", &[F5]),
    (Fault::KeepsFds, "F", &[F5]),
    (Fault::NeedsExactTableSize, "F", &[F6]),
    (Fault::LongLogReply, "F L2", &[F7]),
    (Fault::IgnoresSocketCallFds, "F", &[F8]),
    (Fault::IgnoresConfigOffset, "F C", &[C1]),
];

/// All of them except R3, whose check takes long.
const ORDER: &str = "R1 R2 R4 R5 R6 R7 R8 R9 R10 I7 F8 L3";

const RINGS: &[Row] = &[
    (Fault::NeedsEnable, ORDER, &[R1]),
    // Pages written before the log is installed are lost as well.
    (Fault::RunsDisabledRings, "R1 R2 R4 R5 R6 R7 L8", &[R2, L8]),
    (Fault::RepliesBaseEarly, "R3", &[R3]),
    (Fault::IgnoresBase, "R4", &[R4]),
    (Fault::RewindsOnSetAddr, "R1 R2 R4 R5 R6 R7", &[R5]),
    (Fault::NeedsMemoryBeforeInflight, "R6 R7 I1 I2 I3 I4", &[R6]),
    (Fault::ChecksUnusedLogAddress, ORDER, &[R7]),
    (Fault::IgnoresStatusReset, ORDER, &[R8]),
    (Fault::IgnoresResetDevice, ORDER, &[R8, I7]),
    (Fault::HangsUpAtResetOwner, ORDER, &[R8]),
    (Fault::ForgetsPendingCall, ORDER, &[R10]),
];

const LOG: &[Row] = &[
    (Fault::DoesNotLogData, "L M", &[L1, L2, L8, L9, L11, L15, M1]),
    (Fault::IgnoresLogOffset, "L", &[L2]),
    (Fault::IgnoresLogAddress, "L", &[L3, L4]),
    (Fault::IgnoresLogSize, "L", &[L6]),
    (Fault::NeverStopsLogging, "L", &[L7]),
    (Fault::NeedsLogBeforeLogAll, "L R6", &[L8, L15, R6]),
    (Fault::KeepsOldLog, "L", &[L9]),
    (Fault::StopsLoggingAtMemoryChange, "L M", &[L9, M1]),
    (Fault::MarksLate, "L", &[L10]),
    (Fault::WritesBackStaleMarks, "L", &[L11]),
    (Fault::DoesNotSignalLog, "L", &[L12]),
    (Fault::SuccessorLogsNothing, "L R6", &[L15]),
    (Fault::OffersFewSlots, "M L9", &[M1]),
];

const INFLIGHT: &[Row] = &[
    (Fault::ReportsHalfRegion, "I1", &[I1]),
    // The position of packed rings is only in the region.
    (Fault::DoesNotWriteInflight, "I L15", &[I2, I4, I6, L15]),
    (Fault::SkipsOpenRequests, "I3", &[I3]),
    (Fault::StartsFreshRegionAtZero, "I", &[I5]),
    (Fault::KeepsCountersZero, "I", &[I6]),
    (Fault::KeepsRegionAtReset, "I R8", &[I7]),
];

const CHANNEL: &[Row] = &[
    (Fault::BackendChannel(ChannelFault::EndsConnection), "B", &[B1]),
    (Fault::BackendChannel(ChannelFault::IgnoresReplacement), "B", &[B1]),
    (Fault::BackendChannel(ChannelFault::BlocksOnFullChannel), "B", &[B1]),
    // The check identifies a channel by its calls.
    (Fault::BackendChannel(ChannelFault::SendsNoCalls), "B", &[B1, B3]),
    (Fault::BackendChannel(ChannelFault::IgnoresKicks), "B", &[B1, B3]),
    (Fault::BackendChannel(ChannelFault::KicksDoNotStart), "B", &[B3]),
];

const STATE: &[Row] = &[
    (Fault::DeviceState(StateFault::NoStateBeforeStart), "D", &[D1]),
    (Fault::DeviceState(StateFault::AcceptsAnything), "D", &[D1]),
    (Fault::DeviceState(StateFault::ForgetsState), "D", &[D1]),
    (Fault::DeviceState(StateFault::ResetsOnRefusal), "D", &[D1]),
    (Fault::DeviceState(StateFault::HangsUpOnRefusal), "D", &[D1]),
    (Fault::DeviceState(StateFault::RefusesAfterRefusal), "D", &[D1]),
    (Fault::DeviceState(StateFault::AcceptsAnyDirection), "D", &[D1]),
];

const IOMMU: &[Row] = &[
    (Fault::Iommu(IommuFault::SkipsTranslation), "T1 T4", &[T1, T4]),
    (Fault::Iommu(IommuFault::HangsUpOnDenial), "T L5", &[T1]),
    (Fault::Iommu(IommuFault::BaseWaitsForMisses), "T1 T2 T3 L5", &[T1]),
    (Fault::Iommu(IommuFault::HangsUpOnInvalid), "T L5", &[T2]),
    (Fault::Iommu(IommuFault::IgnoresInvalidation), "T L5", &[T3]),
    (Fault::Iommu(IommuFault::InvalidatesTooEarly), "T3", &[T3]),
    (Fault::Iommu(IommuFault::AssumesContiguous), "T L5", &[T4]),
    (Fault::Iommu(IommuFault::MarksIova), "T1 T3 L5", &[L5]),
];

const POSTCOPY: &[Row] = &[
    (Fault::Postcopy(PostcopyFault::None), "P F3 M1", &[]),
    (Fault::Postcopy(PostcopyFault::WrongFd), "P", &[P1]),
    (Fault::Postcopy(PostcopyFault::EchoesAddresses), "P F3", &[P1]),
    (Fault::Postcopy(PostcopyFault::SendsSecondReply), "P F3", &[F3]),
    (Fault::Postcopy(PostcopyFault::RepliesToAcknowledgement), "P F3", &[F3]),
    (Fault::Postcopy(PostcopyFault::TouchesPagesEarly), "P F3", &[P1]),
    (Fault::Postcopy(PostcopyFault::StopsRingsUntilEnd), "P F3", &[P1]),
    (Fault::Postcopy(PostcopyFault::RefusesEnd), "P", &[P1]),
    (Fault::Postcopy(PostcopyFault::DiesOfHangUp), "P F3", &[P1, R9]),
];

/// Faults that concern split rings, or that use up all timeouts.
const SPLIT: &[Fault] = &[
    Fault::NeedsEnable,
    Fault::IgnoresBase,
    Fault::RewindsOnSetAddr,
    Fault::SkipsOpenRequests,
    Fault::StartsFreshRegionAtZero,
    Fault::KeepsCountersZero,
    Fault::BackendChannel(ChannelFault::SendsNoCalls),
    Fault::BackendChannel(ChannelFault::IgnoresKicks),
    Fault::Iommu(IommuFault::BaseWaitsForMisses),
    Fault::Iommu(IommuFault::InvalidatesTooEarly),
];

/// Faults that show within the settle time: only these use the default one.
const WATCHED: &[Fault] = &[Fault::RunsDisabledRings, Fault::IgnoresStatusReset, Fault::IgnoresResetDevice];

/// Rules whose failure other tests show: a process that exits, and late I/O.
const ELSEWHERE: &[Rule] = &[R9, I9];

/// Returns the rules with these ids or first letters.
fn named(starts: &str) -> Vec<Rule> {
    let is = |id: &str| starts.split(' ').any(|start| id == start || start.len() == 1 && id.starts_with(start));
    Rule::ALL.iter().copied().filter(|rule| is(rule.id())).collect()
}

fn failed_rules(report: &CheckReport) -> BTreeSet<Rule> {
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
fn each_injected_fault_fails_exactly_its_own_check(#[case] rows: &[Row], #[case] every_check: bool) {
    let mut passed = BTreeSet::new();
    let mut failed = BTreeSet::new();
    for (fault, only, breaks) in rows {
        let is_split = SPLIT.contains(fault) || matches!(fault, Fault::Postcopy(_));
        let rings = is_split.then_some(RingKind::Split);
        let usual = CheckOptions::default();
        let settle = if WATCHED.contains(fault) { usual.settle } else { Duration::from_millis(50) };
        let report =
            checked(*fault, usual.with_only(named(only)).with_rings(rings).with_settle(settle).with_may_kill(true));
        assert_eq!(failed_rules(&report), breaks.iter().copied().collect(), "{fault:?}\n{report}");
        for finding in report.findings.iter().filter(|finding| breaks.contains(&finding.rule)) {
            let checks = if finding.verdict == Verdict::Fail { &mut failed } else { &mut passed };
            checks.insert(finding.what);
        }
    }
    passed.retain(|what| !what.starts_with("hostile") && !failed.contains(what));
    assert!(!every_check || passed.is_empty(), "nobody fails {passed:?}");
}

#[test]
fn a_back_end_without_faults_passes_and_every_check_has_a_fault_that_fails_it() {
    let report = checked(Fault::None, CheckOptions::default());
    assert_eq!(failed_rules(&report), BTreeSet::new(), "{report}");
    let unchecked = |rule: Rule| {
        let mut of = report.findings.iter().filter(|finding| finding.rule == rule);
        of.all(|finding| finding.what == rule.title())
    };
    let checked: BTreeSet<Rule> = Rule::ALL.iter().copied().filter(|rule| !unchecked(*rule)).collect();
    let rows = [FRAMING, RINGS, LOG, INFLIGHT, CHANNEL, STATE, IOMMU, POSTCOPY].into_iter().flatten();
    let failed: BTreeSet<Rule> = rows.flat_map(|(.., breaks)| *breaks).chain(ELSEWHERE).copied().collect();
    // Migration of requests in flight and an IOMMU are optional.
    assert_eq!(checked.difference(&failed).copied().collect::<Vec<_>>(), [T5, I8], "{report}");
}

#[test]
fn harmless_deviations_are_warnings() {
    let report = checked(Fault::MarksEverything, CheckOptions::default().with_only(named("L")));
    assert!(!report.has_failures(), "{report}");
    let data = report.findings.iter().find(|finding| finding.rule == L1).unwrap();
    assert!(data.verdict == Verdict::Warning && data.seen.contains("% of the marks"), "{report}");
    let report = checked(Fault::SuccessorMarksOnlyItsWrites, CheckOptions::default().with_only(named("L15 L8")));
    assert_eq!(report.rules().get(&L15), Some(&Verdict::Warning), "{report}");
    assert!(!report.has_failures(), "{report}");
    let report = checked(Fault::Iommu(IommuFault::AcknowledgesInvalid), CheckOptions::default().with_only(named("T")));
    assert!(!report.has_failures(), "{report}");
    assert_eq!(report.rules().get(&T2), Some(&Verdict::Warning), "{report}");
    let report = checked(Fault::AcceptsEmptyLog, CheckOptions::default().with_only(named("L2")).with_hostile(true));
    let log = report.findings.iter().find(|finding| finding.what.starts_with("hostile")).unwrap();
    assert_eq!(log.verdict, Verdict::Warning, "{report}");
    assert!(log.seen.ends_with("acknowledged as done: a log of no bytes"), "{report}");
    let report =
        checked(Fault::DeviceState(StateFault::BlocksWhileLoading), CheckOptions::default().with_only(named("D")));
    assert_eq!(report.rules().get(&D1), Some(&Verdict::Warning), "{report}");
}

#[test]
fn harmless_postcopy_deviations_are_warnings_and_a_missing_userfaultfd_is_not_tested() {
    let odd = [
        (PostcopyFault::OffersSlots, M1, "PAGEFAULT and CONFIGURE_MEM_SLOTS"),
        (PostcopyFault::AdvisesWithoutFeature, P1, "answered with an fd"),
        (PostcopyFault::ListensWithoutAdvise, P1, "acknowledged as done"),
        (PostcopyFault::MakesUpPages, P1, "the next was served; "),
    ];
    for (late, rule, seen) in odd {
        let options =
            CheckOptions::default().with_only(named("P F3 M1")).with_rings(Some(RingKind::Split)).with_may_kill(true);
        let report = checked(Fault::Postcopy(late), options);
        assert!(!report.has_failures(), "{late:?}\n{report}");
        let mut warned = report.findings.iter().filter(|finding| finding.verdict == Verdict::Warning);
        let found = warned.next().unwrap();
        assert!(found.rule == rule && found.seen.starts_with(seen) && warned.next().is_none(), "{late:?}\n{report}");
    }
    let options = CheckOptions::default().with_only(named("P")).with_may_kill(true);
    let report = checked(Fault::Postcopy(PostcopyFault::NoUserfaultfd), options);
    assert_eq!(report.rules().get(&P1), Some(&Verdict::NotTested), "{report}");
    assert!(report.findings.iter().all(|finding| finding.seen.contains("unprivileged_userfaultfd")), "{report}");
    // A back-end without postcopy refuses it.
    let report = checked(Fault::None, CheckOptions::default().with_only(named("P")));
    assert_eq!(report.rules().get(&P1), Some(&Verdict::NotOffered), "{report}");
    assert!(report.findings.iter().any(|finding| finding.seen.contains("POSTCOPY_ADVISE is refused")), "{report}");
}

#[test]
fn a_back_end_that_floods_its_channel_does_not_block_the_check() {
    for (rule, only) in [(B1, vec![B1]), (T2, vec![T2])] {
        let options = CheckOptions::default().with_only(only).with_rings(Some(RingKind::Split));
        let report = checked(Fault::BackendChannel(ChannelFault::Floods), options);
        assert_eq!(failed_rules(&report), BTreeSet::from([rule]), "{report}");
        let why = |seen: &str| seen.contains("does not read them") || seen.contains("without an end");
        assert!(report.findings.iter().any(|finding| why(&finding.seen)), "{report}");
    }
}

#[test]
fn requests_to_a_disk_with_large_blocks_cover_whole_blocks() {
    let (only, rings) = (named("C L1 R3 R9"), Some(RingKind::Split));
    let report =
        checked(Fault::LargeBlocks, CheckOptions::default().with_only(only).with_rings(rings).with_write(true));
    assert_eq!(failed_rules(&report), BTreeSet::new(), "{report}");
    let written = report.findings.iter().find(|finding| finding.what.starts_with("writes accepted")).unwrap();
    assert_eq!(written.verdict, Verdict::Pass, "{report}");
}

/// The fault is a crash at a log that covers only the lower region.
#[test]
fn destructive_checks_run_only_with_may_kill() {
    let fragile = Fault::DiesOf(Code::SET_LOG_BASE, &[128, 0, 0, 0, 0, 0, 0, 0]);
    let usual = CheckOptions::default().with_only(vec![L6, P1]).with_rings(Some(RingKind::Split));
    let report = checked(fragile, usual.clone());
    assert_eq!(failed_rules(&report), BTreeSet::new(), "{report}");
    let left_out = report.findings.iter().filter(|finding| finding.seen.starts_with("needs --may-kill"));
    assert_eq!(left_out.map(|finding| finding.rule).collect::<Vec<_>>(), [L6, P1], "{report}");
    let report = checked(fragile, usual.with_may_kill(true));
    assert_eq!(failed_rules(&report), BTreeSet::from([L6, R9]), "{report}");
}

#[test]
fn a_back_end_that_dies_fails_r9_and_later_checks_are_not_tested() {
    let report = checked(Fault::DiesOfUnknownRequest, CheckOptions::default());
    assert_eq!(failed_rules(&report), BTreeSet::from([F5, R9]), "{report}");
    assert_eq!(report.rules().get(&R3), Some(&Verdict::NotTested), "{report}");
}

/// A fault, the rule whose check triggers the crash, and the beginning of the finding.
const DEADLY: &[(Fault, Rule, &str)] = &[
    (Fault::DiesOfVersion, F1, "version 0: "),
    (Fault::DiesOfShortPayload, F6, "SET_FEATURES: "),
    (Fault::DiesOf(Code::SET_MEM_TABLE, &[0xff; 4]), M1, "2^32 - 1 regions: "),
    (Fault::DiesOf(Code::SET_VRING_NUM, &[0x0f, 0x27, 0, 0]), R2, "the size of ring 9999: "),
    (Fault::DiesOf(Code::SET_LOG_BASE, &[0, 0xf0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), L2, "a log that wraps: "),
    (Fault::DiesOf(Code::GET_CONFIG, &[0xff; 4]), C1, "configuration that wraps: "),
    (Fault::DiesOf(Code::SET_INFLIGHT_FD, &[0, 0xf0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]), I1, "a region that wraps: "),
    (Fault::DiesOfNoise, I3, "a region of noise: "),
    (Fault::DiesOfLoop, R9, "a loop of one: "),
    (Fault::DeviceState(StateFault::DiesOfOnes), D1, "a MiB of ones: "),
];

#[test]
fn hostile_messages_are_sent_only_with_hostile() {
    for (fault, rule, message) in DEADLY {
        let usual = CheckOptions::default().with_only(vec![*rule]).with_rings(Some(RingKind::Split));
        let usual = usual.with_settle(Duration::from_millis(50));
        let report = checked(*fault, usual.clone());
        assert_eq!(failed_rules(&report), BTreeSet::new(), "{fault:?}\n{report}");
        let hostile = |report: &CheckReport| {
            let mut hostile = report.findings.iter().filter(|finding| finding.what.starts_with("hostile"));
            hostile.next().unwrap().clone()
        };
        assert_eq!(hostile(&report).seen, "needs --hostile", "{fault:?}\n{report}");
        let report = checked(*fault, usual.with_hostile(true));
        assert_eq!(failed_rules(&report), BTreeSet::from([*rule, R9]), "{fault:?}\n{report}");
        let death = hostile(&report);
        let named = death.verdict == Verdict::Fail && death.seen.starts_with(message);
        assert!(named, "the message that it died of is named, {message:?}: {report}");
    }
}

#[test]
fn an_interface_that_does_not_log_or_receives_after_get_vring_base_fails_on_receive_rings() {
    let found = |fault: Fault, only: &[Rule]| {
        let (only, rings) = (only.to_vec(), Some(RingKind::Split));
        let report = Backend::net(fault).checked(
            CheckOptions::default().with_only(only).with_rings(rings).with_frame_source(Some(FrameSource::Loop)),
        );
        let broken = report.findings.iter().filter(|finding| finding.verdict == Verdict::Fail);
        (broken.map(|finding| (finding.rule, finding.rings)).collect::<BTreeSet<_>>(), report)
    };
    let rules = [L1, L3, R3];
    let (broken, report) = found(Fault::None, &rules);
    assert_eq!(broken, BTreeSet::new(), "{report}");
    let (broken, report) = found(Fault::DoesNotLogData, &rules);
    assert_eq!(broken, BTreeSet::from([(L1, "split receive")]), "{report}");
    for fault in [Fault::RepliesBaseEarly, Fault::RunsAfterGetBase] {
        let (broken, report) = found(fault, &[R3]);
        assert!(broken.contains(&(R3, "split receive")), "{fault:?}\n{report}");
    }
}

#[test]
fn only_selects_the_rules_in_the_report() {
    let report = checked(Fault::None, CheckOptions::default().with_only(vec![I4, L13, F2]));
    let verdicts: Vec<_> = report.rules().into_iter().collect();
    assert_eq!(verdicts, [(F2, Verdict::Pass), (L13, Verdict::NotTested), (I4, Verdict::Pass)], "{report}");
    // I2 and I3 of packed rings are I4.
    assert!(report.findings.iter().filter(|finding| finding.rule == I4).all(|finding| finding.rings == "packed"));
}

#[test]
fn every_documented_rule_is_a_rule_of_check() {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/protocol.md")).unwrap();
    let (page, _) = page.split_once("\n## Disk generation and identity").expect("the extension of this project");
    let documented: BTreeSet<&str> =
        page.lines().filter_map(|line| line.strip_prefix("### ")?.split(' ').next()).collect();
    let known: BTreeSet<&str> = Rule::ALL.iter().map(|rule| rule.id()).collect();
    assert_eq!(known, documented);
}
