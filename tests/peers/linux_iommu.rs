//! A real Linux guest in QEMU whose disk is behind a vIOMMU. The guest's kernel maps the pages of each request for that
//! request and unmaps them after it (rules T1 to T3, L5).

use crate::backend::Kind;
use crate::linux_guest::{boot_with, there_and_back};
use crate::process::Lab;

/// QEMU's arguments for the IOMMU and, after it, the disk behind it. QEMU passes ACCESS_PLATFORM on only with a vIOMMU
/// and `iommu_platform=on` (rule T5.1).
const BEHIND: &str = "-device intel-iommu,intremap=off,device-iotlb=on \
    -device vhost-user-blk-pci,chardev=vu,num-queues=1,iommu_platform=on,ats=on,disable-legacy=on";

/// Tests a guest that maps the pages of each request separately and unmaps them before it uses the buffer otherwise.
fn works_behind_an_iommu(packed: &str) {
    let lab = Lab::new();
    let boot = boot_with(&lab, &["intel_iommu=on", "iommu.strict=1"]);
    let said = there_and_back(&lab, Kind::OursIommu, &boot, &format!("{BEHIND},packed={packed}"), &[false, true]);
    for said in said {
        let count = |what: &str| said.lines().filter(|line| line.contains(what)).count();
        let (asked, told) = (count(": miss at "), count("DEBUG IOTLB_MSG"));
        eprintln!("{asked} misses, {told} updates and invalidations");
        assert!(asked > 100, "only {asked} translations were asked for");
        // There is one update for each miss, and there are invalidations, each of one page or many.
        assert!(told > asked + 100, "{told} updates and invalidations for {asked} misses");
        assert!(!said.contains("refused"), "{said}");
    }
}

#[test]
fn a_linux_guest_behind_an_iommu_moves_there_and_back_and_its_back_ends_die_and_every_byte_is_right() {
    works_behind_an_iommu("off");
}

#[test]
fn so_it_does_with_packed_rings() {
    works_behind_an_iommu("on");
}
