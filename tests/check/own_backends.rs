//! Our back-ends pass every rule on split and packed rings, with kills and hostile messages.

use std::collections::BTreeSet;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use crate::command::{command, same, serving, text};
use crate::faulty_backend::image;

/// Rules that a disk passes with all options.
const PASSING: &[&str] = &[
    "F1", "F2", "F3", "F4", "F5", "F6", "F7", "F8", "B1", "B3", "R1", "R2", "R3", "R4", "R5", "R6", "R7", "R8", "R9",
    "R10", "L1", "L2", "L3", "L4", "L6", "L7", "L8", "L9", "L10", "L11", "L12", "L15", "M1", "C1", "I1", "I2", "I3",
    "I4", "I5", "I6", "I7", "I9",
];
/// Result without --postcopy.
const NO_POSTCOPY: &str = "PAGEFAULT is not offered";
/// Rules that cannot be checked from outside, or need an option that is off.
const UNTESTED: &[&str] = &["B2", "B4", "F9", "F10", "R11", "R12", "L13", "L14", "T5", "I8", "I10", "I11", "I12", "D2"];

#[test]
fn the_block_back_end_passes_every_rule_with_hostile_write_and_restart() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path()).image;
    let before = std::fs::read(&image).unwrap();
    let (socket, junit) = (folder.path().join("socket"), folder.path().join("check.xml"));
    let program = env!("CARGO_BIN_EXE_vhost-migrate");
    let (socket, xml) = (socket.to_str().unwrap(), junit.to_str().unwrap());
    let start = format!("{program} backend blk --socket {socket} --image {} --queues 2", image.display());
    let output = command(&[socket, "--json", "--hostile", "--write", "--restart", &start, "--junit", xml]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report:#}\n{}", text(&output.stderr));
    assert_eq!(report["failed"], false);
    assert!(std::fs::read(&image).unwrap() == before, "the disk is not as it was");
    let rules = report["rules"].as_object().unwrap();
    let of =
        |verdict: &str| rules.iter().filter(|(_, v)| *v == verdict).map(|(rule, _)| &**rule).collect::<BTreeSet<_>>();
    // Everything else has a check that was run. A disk has no device state, and this one no IOMMU.
    let absent = ["DEVICE_STATE is not offered", "ACCESS_PLATFORM is not offered"];
    let not_offered = |finding: &Value| absent.contains(&text_of(finding)) || text_of(finding).starts_with(NO_POSTCOPY);
    for finding in report["report"]["findings"].as_array().unwrap().iter().filter(|finding| !not_offered(finding)) {
        let untested =
            UNTESTED.contains(&finding["rule"].as_str().unwrap()) || finding["seen"] == "there is no check for it";
        assert!(finding["verdict"] == "pass" || untested, "{finding}");
    }
    assert_eq!(of("pass"), PASSING.iter().copied().collect(), "{report:#}");
    assert!(!text(&output.stderr).contains("panicked"));
    assert!(UnixStream::connect(socket).is_err(), "what the check started outlived it");
    let xml = std::fs::read_to_string(junit).unwrap();
    same(&xml, &report);
    assert!(xml.contains("failures=\"0\""), "{xml}");
}

#[test]
fn ring_sizes_follow_the_largest_size_that_the_back_end_accepts() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path()).image;
    let (program, rules) = (env!("CARGO_BIN_EXE_vhost-migrate"), "F3,R1,R3,R4,R9,L1,L3,L4,L9,I1,I3,I4,M1");
    for (entries, of) in [("64", "rings of 64"), ("128", "rings of 128"), ("512", "rings of 256")] {
        let socket = folder.path().join(entries);
        let socket = socket.to_str().unwrap();
        let start =
            format!("{program} backend blk --socket {socket} --image {} --queue-size {entries}", image.display());
        let output = command(&[socket, "--json", "--only", rules, "--restart", &start]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{report:#}\n{}", text(&output.stderr));
        assert!(report["report"]["offers"].as_str().unwrap().contains(of), "{report:#}");
        for rule in rules.split(',') {
            assert_eq!(report["rules"][rule], "pass", "{report:#}");
        }
    }
    // A requested size is not changed, and sizes too small for a batch are not tried.
    for (entries, asked) in [("128", "256"), ("32", "")] {
        let socket = folder.path().join("refused");
        let socket = socket.to_str().unwrap();
        let start =
            format!("{program} backend blk --socket {socket} --image {} --queue-size {entries}", image.display());
        let asked = (!asked.is_empty()).then_some(["--queue-size", asked]);
        let output = command(&[&[socket, "--restart", &start][..], asked.as_ref().map_or(&[], |asked| asked)].concat());
        assert_eq!(output.status.code(), Some(3), "{}", text(&output.stderr));
        assert!(text(&output.stderr).contains("refuses rings of"), "{}", text(&output.stderr));
    }
}

#[test]
fn the_network_back_end_passes_every_rule_on_transmit_and_receive_rings() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let (program, socket) = (env!("CARGO_BIN_EXE_vhost-migrate"), socket.to_str().unwrap());
    let start = format!("{program} backend net --socket {socket} --loopback --queue-pairs 2");
    let output = command(&[socket, "--json", "--hostile", "--frame-source", "loop", "--restart", &start]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report:#}\n{}", text(&output.stderr));
    let findings = report["report"]["findings"].as_array().unwrap();
    let disks = |finding: &Value| finding["seen"] == "a disk is not offered";
    // With device state there is no status (rule D1.10).
    let absent = ["STATUS is not offered", "ACCESS_PLATFORM is not offered"];
    let not_offered = |finding: &Value| absent.contains(&text_of(finding)) || text_of(finding).starts_with(NO_POSTCOPY);
    for finding in findings.iter().filter(|finding| !disks(finding) && !not_offered(finding)) {
        let untested =
            UNTESTED.contains(&finding["rule"].as_str().unwrap()) || finding["seen"] == "there is no check for it";
        assert!(finding["verdict"] == "pass" || untested, "{finding}");
    }
    let kept = |rule: &str, rings: &str| {
        let mut of = findings.iter().filter(|finding| finding["rule"] == rule && finding["rings"] == rings);
        assert!(of.any(|finding| finding["verdict"] == "pass"), "{rule} on {rings} was not checked: {report:#}");
    };
    for rings in ["split receive", "split transmit", "packed receive", "packed transmit"] {
        ["R3", "R4"].iter().for_each(|rule| kept(rule, rings));
        kept(if rings.starts_with("split") { "L3" } else { "L4" }, rings);
    }
    for rings in ["split receive", "packed receive"] {
        ["L1", "L8", "L9"].iter().for_each(|rule| kept(rule, rings));
    }
    for rule in ["B1", "B3", "D1"] {
        assert_eq!(report["rules"][rule], "pass", "{report:#}");
    }
    assert_eq!((&report["rules"]["I3"], &report["rules"]["I4"]), (&"pass".into(), &"pass".into()), "{report:#}");
}

/// Rule T3.3.
#[test]
fn our_back_ends_pass_the_iommu_rules() {
    let folder = tempfile::tempdir().unwrap();
    let (image, program) = (image(folder.path()).image, env!("CARGO_BIN_EXE_vhost-migrate"));
    let disk = (format!("blk --image {} --queues 2", image.display()), "", ["split", "packed"].as_slice());
    let frames = ["split transmit", "split receive", "packed transmit", "packed receive"].as_slice();
    let net = ("net --loopback --queue-pairs 2".to_string(), "--frame-source=loop", frames);
    for (kind, feed, all) in [disk, net] {
        let socket = folder.path().join("iommu");
        let socket = socket.to_str().unwrap();
        let start = format!("{program} backend {kind} --iommu --socket {socket}");
        let mut arguments = vec![socket, "--json", "--only", "T1,T2,T3,T4,T5,L5", "--restart", &start];
        arguments.extend((!feed.is_empty()).then_some(feed));
        let output = command(&arguments);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{report:#}\n{}", text(&output.stderr));
        let findings = report["report"]["findings"].as_array().unwrap();
        for finding in findings {
            assert!(finding["verdict"] == "pass" || finding["rule"] == "T5", "{finding}");
        }
        for (rule, rings) in ["T1", "T4", "L5"].iter().flat_map(|rule| all.iter().map(move |rings| (rule, rings))) {
            let seen = findings.iter().any(|finding| finding["rule"] == *rule && finding["rings"] == *rings);
            assert!(seen, "{rule} on {rings} was not checked: {report:#}");
        }
        assert_eq!((&report["rules"]["T2"], &report["rules"]["T3"]), (&"pass".into(), &"pass".into()), "{report:#}");
        assert_eq!(report["rules"]["T5"], "not-tested", "it is offered");
    }
}

#[test]
fn our_back_ends_pass_the_postcopy_rules() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path()).image;
    let (program, image) = (env!("CARGO_BIN_EXE_vhost-migrate"), image.to_str().unwrap());
    let blk = (format!("blk --image {image}"), vec!["split", "packed"]);
    let direct = (format!("blk --image {image} --direct --queues 2"), vec!["split", "packed"]);
    let rings = ["split receive", "split transmit", "packed receive", "packed transmit"];
    for (number, (device, rings)) in [blk, direct, ("net --loopback".into(), rings.to_vec())].into_iter().enumerate() {
        let socket = folder.path().join(format!("postcopy-{number}"));
        let socket = socket.to_str().unwrap();
        let start = format!("{program} backend {device} --socket {socket} --postcopy");
        let output = command(&[socket, "--json", "--only", "P1,M1,F3", "--restart", &start]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(0), "{report:#}\n{}", text(&output.stderr));
        let findings = report["report"]["findings"].as_array().unwrap();
        let of_postcopy = findings.iter().filter(|finding| finding["rule"] == "P1");
        assert!(of_postcopy.clone().all(|finding| finding["verdict"] == "pass"), "{report:#}");
        let seen_on: BTreeSet<&str> = of_postcopy.filter_map(|finding| finding["rings"].as_str()).collect();
        assert_eq!(seen_on, rings.into_iter().chain([""]).collect(), "{report:#}");
        let kept = |rule: &str| {
            let mut of = findings.iter().filter(|finding| finding["rule"] == rule && finding["verdict"] == "pass");
            of.any(|finding| finding["what"].as_str().unwrap().contains("postcopy"))
        };
        assert!(kept("M1") && kept("F3"), "{report:#}");
    }
}

#[test]
fn rules_without_incoming_frames_are_checked_without_a_frame_source() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, wire) = (folder.path().join("socket"), folder.path().join("wire"));
    let (program, socket) = (env!("CARGO_BIN_EXE_vhost-migrate"), socket.to_str().unwrap());
    let start = format!("{program} backend net --socket {socket} --pair {}", wire.display());
    let output = command(&[socket, "--json", "--only", "L1,L3,R3,R4,R10", "--restart", &start]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report:#}\n{}", text(&output.stderr));
    assert_eq!((&report["rules"]["L1"], &report["rules"]["L3"]), (&"not-tested".into(), &"pass".into()), "{report:#}");
    // The other end of the pair is the frame source.
    let other = folder.path().join("other");
    let other = other.to_str().unwrap();
    let arguments = ["backend", "net", "--socket", other, "--pair", wire.to_str().unwrap()];
    let mut peer = serving(&arguments, Path::new(other));
    let rules = ["L1", "L2", "L9", "M1", "R3", "R4"];
    let output = command(&[socket, "--json", "--only", &rules.join(","), "--frame-source", other, "--restart", &start]);
    peer.kill().unwrap();
    peer.wait().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0), "{report:#}\n{}", text(&output.stderr));
    for rule in rules {
        assert_eq!(report["rules"][rule], "pass", "{report:#}");
    }
}

/// Returns the observation of a finding.
fn text_of(finding: &Value) -> &str {
    finding["seen"].as_str().unwrap()
}
