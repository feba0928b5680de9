//! Guest memory in huge pages of the kernel.

use std::os::fd::AsFd;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_migrate::memory::{GuestAddress, Memory, Region, UserAddress};

const HUGE: u64 = 2 << 20;
const POOL: &str = "/proc/sys/vm/nr_hugepages";

/// Reserves four huge pages if the kernel has fewer.
fn reserve() {
    let pages: u64 = std::fs::read_to_string(POOL).unwrap().trim().parse().unwrap();
    if pages < 4 {
        std::fs::write(POOL, "4").expect("as root, or after `sysctl vm.nr_hugepages=4`");
    }
}

#[test]
fn a_region_of_huge_pages_begins_between_them_and_is_checked_like_any_other() {
    reserve();
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let fd = memfd_create(c"huge", flags).unwrap();
    nix::unistd::ftruncate(&fd, 2 * HUGE as i64).unwrap();
    let map = |gpa, size, user, offset| Region::map(fd.as_fd(), gpa, size, UserAddress(user), offset);
    let high = GuestAddress(1 << 32);
    let all = Memory::new([Arc::new(map(GuestAddress(0), 2 * HUGE, 0, 0).unwrap())]).unwrap();
    all.write(GuestAddress(HUGE + 0x3000), b"here").unwrap();
    // Machines with a memory hole below 1 MiB have such offsets.
    let part = Memory::new([Arc::new(map(high, HUGE - 0x3000, 1 << 40, HUGE + 0x3000).unwrap())]).unwrap();
    let mut found = [0; 4];
    part.read(high, &mut found).unwrap();
    assert_eq!(&found, b"here");
    assert!(map(GuestAddress(0), HUGE, 0, HUGE + 0x1000).is_err(), "beyond the file");
}
