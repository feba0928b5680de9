//! What `check` says of `qemu-storage-daemon`. `docs/check.md` explains each finding.

use std::collections::BTreeSet;
use std::fs::File;
use std::time::Duration;

use vhost_migrate::check::{Options, Verdict, check};

use crate::backend::{Backend, Kind};
use crate::process::Lab;

const IMAGE_BYTES: u64 = 16 << 20;

#[test]
fn the_storage_daemon_breaks_what_the_documentation_says_and_nothing_else() {
    let lab = Lab::new();
    let image = lab.file("disk.img");
    File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
    let backend = Backend::start(&lab, Kind::StorageDaemon { bytes_per_second: None }, "qsd", &image, 2);
    let options = Options { timeout: Duration::from_secs(5), write: true, ..Options::default() };
    let report = check(backend.socket(), &options).unwrap();
    let rules = report.rules();
    let of = |verdict| rules.iter().filter(|(_, v)| **v == verdict).map(|(rule, _)| *rule).collect::<BTreeSet<_>>();
    let expected = ["F2", "F5", "C1", "R2", "R3", "R9", "L3", "L6", "L8", "L12"];
    assert_eq!(of(Verdict::Broken), BTreeSet::from(expected), "{report}");
    assert_eq!(of(Verdict::Warning), BTreeSet::from(["F7", "R1"]), "{report}");
    assert_eq!(of(Verdict::NotOffered), BTreeSet::from(["I1", "I2", "I3", "I5", "I6", "I7"]), "{report}");
    // The log is what a migration rests on, and the disk is as it was.
    for rule in ["L1", "L2", "L7", "L9", "M1", "R4", "R5"] {
        assert_eq!(rules.get(rule), Some(&Verdict::Kept), "{rule}\n{report}");
    }
    assert!(std::fs::read(&image).unwrap().iter().all(|byte| *byte == 0));
    // It is dead by now (rule L6); of that the report speaks too.
    let death = report.findings.iter().find(|finding| finding.rule == "R9" && finding.verdict == Verdict::Broken);
    assert!(death.unwrap().seen.contains("L6"), "{report}");
}
